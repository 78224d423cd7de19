-- id, client, 'detach' or grace_ms: a client on an open connection is not there any more. With 'detach' it will ask for
-- the job later; else the job is given up when nobody else waits for it, after the grace time.
-- → 'missing', or the job's state after the call.
local id, client, how = ARGV[1], ARGV[2], ARGV[3]
redis.call('SREM', P .. 'a:' .. id, client)
local job = load(id)
if not job.state then return 'missing' end
if how == 'detach' then
  set(id, 'detached', 1)
elseif not job.detached and redis.call('SCARD', P .. 'a:' .. id) == 0 then
  if tonumber(how) <= 0 then
    if job.state == 'queued' or job.state == 'running' and not job.cancel then learn_patience(job, true) end
    return give_up(id, 'cancelled')
  end
  if job.state == 'queued' or job.state == 'running' then
    redis.call('ZADD', P .. 'ab', int(now_us() + tonumber(how) * 1000), id)
  end
end
return job.state
