-- id, client, 'detach' or grace_ms: a client on an open connection is not there any more. With 'detach' it will ask for
-- the job later; else the job is given up when nobody else waits for it, after the grace time.
-- → 'missing', or the job's state after the call.
local id, client, how = ARGV[1], ARGV[2], ARGV[3]
local key = P .. 'j:' .. id
redis.call('SREM', P .. 'a:' .. id, client)
local job = redis.call('HMGET', key, 'state', 'detached')
if not job[1] then return 'missing' end
if how == 'detach' then
  redis.call('HSET', key, 'detached', 1)
elseif not job[2] and redis.call('SCARD', P .. 'a:' .. id) == 0 then
  if tonumber(how) <= 0 then return give_up(id, 'cancelled') end
  if job[1] == 'queued' or job[1] == 'running' then
    redis.call('ZADD', P .. 'ab', int(now_us() + tonumber(how) * 1000), id)
    keep(P .. 'ab', 2 * tonumber(how))
  end
end
return job[1]
