-- id, token, 'done' | 'failed', result → the job's state if this claim ended it (now or by an earlier call), else 'fenced'.
local id, token, state, result = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local held, found, holder = mine(id, token)
if not held then
  if found and found ~= 'queued' and found ~= 'running' and holder == token then return found end
  redis.call('HINCRBY', P .. 'n', 'fenced', 1)
  return 'fenced'
end
if state == 'done' then drained(id) end
local given_up = redis.call('HGET', P .. 'j:' .. id, 'cancel')
if given_up then state, result = given_up, '' end
if state == 'done' then count_usage(id) end
close(id, state, result)
return state
