-- id → 'missing', or the job's state after the call. A waiting job ends at once; a running one is marked (and stays
-- 'running' until its worker notices); a finished one stays as it is.
local id = ARGV[1]
local key = P .. 'j:' .. id
local job = redis.call('HMGET', key, 'state', 'bucket')
if not job[1] then return 'missing' end
if job[1] == 'queued' then
  pull(id, job[2])
  close(id, 'cancelled', '')
  return 'cancelled'
end
if job[1] == 'running' then redis.call('HSET', key, 'cancel', 1) end
return job[1]
