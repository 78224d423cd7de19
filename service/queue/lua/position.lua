-- id → {the number of jobs that come before it, how long they will take in ms (0: unknown)}; {-1, 0} if it waits not.
local job = redis.call('HMGET', P .. 'j:' .. ARGV[1], 'state', 'score')
if job[1] ~= 'queued' then return {-1, 0} end
local ahead = ahead_of(job[2])
return {ahead, int(drain_ms(ahead))}
