-- worker, max attempts: its process is known to be dead, so nothing waits for its leases to run out.
-- → the number of jobs that it held.
local worker, max_attempts, held = ARGV[1], tonumber(ARGV[2]), 0
for _, id in ipairs(redis.call('ZRANGE', P .. 'l', 0, -1)) do
  local job = load(id)
  if job.worker == worker then
    bury_or_requeue(job, max_attempts)
    held = held + 1
  end
end
for _, id in ipairs(redis.call('ZRANGE', P .. 'sc', 0, -1)) do
  local job = load(id)
  if job.worker == worker then lose_scores(job) end
end
redis.call('ZREM', P .. 'wk', worker)
redis.call('DEL', P .. 'wi:' .. worker, P .. 'wo:' .. worker, P .. 'c:' .. worker)
return held
