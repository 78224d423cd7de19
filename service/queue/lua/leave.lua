-- id, client, grace_ms: a client on an open connection is not there any more. The job is given up when nobody else waits
-- for it, after the grace time.
-- → 'missing', or the job's state after the call.
local id, client, grace_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])
redis.call('SREM', P .. 'a:' .. id, client)
local job = load(id)
if not job.state then return 'missing' end
if not job.detached and redis.call('SCARD', P .. 'a:' .. id) == 0 then
  if grace_ms <= 0 then
    if job.state == 'queued' or job.state == 'running' and not job.cancel then learn_patience(job, true) end
    return give_up(id, 'cancelled')
  end
  if job.state == 'queued' or job.state == 'running' then
    redis.call('ZADD', P .. 'ab', int(now_us() + grace_ms * 1000), id)
  end
end
return job.state
