-- worker, what it says about itself, lease_ms, max attempts, JSON of {background task: its failures since the last beat},
-- then pairs of (id, token) that it holds
-- → {order, {{id, 'cancelled' | 'expired' | 'lost'}, …}}: what an operator wants of it (order.lua), and the jobs that it
-- need not go on with. The other leases are renewed (and the time that it has for the scores of a job that is done), and
-- leases that others have let run out are reaped: no HTTP process is needed for that.
local worker, info, lease_ms, max_attempts = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local now, drop = now_us(), {}
redis.call('ZADD', P .. 'wk', int(now + lease_ms * 2000), worker)
redis.call('ZREMRANGEBYSCORE', P .. 'wk', '-inf', '(' .. int(now))
redis.call('PEXPIRE', P .. 'wk', int(lease_ms * 4))
redis.call('SET', P .. 'wi:' .. worker, info, 'PX', int(lease_ms * 2))
for task, count in pairs(cjson.decode(ARGV[5])) do redis.call('HINCRBY', P .. 'n', 'failed:' .. task, count) end
for i = 6, #ARGV, 2 do
  local job = load(ARGV[i])
  if owes_scores(job, ARGV[i + 1]) then
    owe_scores(job.id, lease_ms)
  elseif not mine(job, ARGV[i + 1]) then
    drop[#drop + 1] = {job.id, 'lost'}
  else
    redis.call('ZADD', P .. 'l', int(now + lease_ms * 1000), job.id)
    if job.cancel then drop[#drop + 1] = {job.id, job.cancel} end
  end
end
keep(P .. 'l', WEEK_MS)
reap(32, max_attempts)
local order = redis.call('GET', P .. 'wo:' .. worker)
if order then keep(P .. 'wo:' .. worker, WEEK_MS) end
return {order or '', drop}
