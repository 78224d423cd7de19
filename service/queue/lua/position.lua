-- id → {the number of jobs that come before it, how long they will take in ms (0: unknown)}; {-1, 0} if it is not waiting.
local job = load(ARGV[1])
if job.state ~= 'queued' then return {-1, 0} end
local ahead = ahead_of(job.score)
return {ahead, int(drain_ms(ahead, redis.call('ZCARD', P .. 'o')))}
