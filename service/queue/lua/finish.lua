-- id, token, 'done' | 'failed', result → the job's state if this claim ended it (now or by an earlier call), else 'fenced'.
local id, token, state, result = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local held, found, holder = mine(id, token)
if not held then
  if found and found ~= 'queued' and found ~= 'running' and holder == token then return found end
  redis.call('HINCRBY', P .. 'n', 'fenced', 1)
  return 'fenced'
end
if redis.call('HEXISTS', P .. 'j:' .. id, 'cancel') == 1 then
  state, result = 'cancelled', ''
end
close(id, state, result)
return state
