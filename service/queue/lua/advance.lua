-- id, token, shape, images, cost, result: a round of the job is drawn, and another one is to follow that is drawn in
-- another manner (other steps, other seeds). Its pictures so far are kept: a job that is given up from now on ends with
-- them. It waits at its old place, and its key is charged a turn, and quota, for the further work.
-- → 'queued', the job's state if it was given up meanwhile, or 'fenced'.
local token = ARGV[2]
local job = load(ARGV[1])
if job.advanced == token and job.state then return 'queued' end  -- the answer to this call was lost
if not mine(job, token) then
  redis.call('HINCRBY', P .. 'n', 'fenced', 1)
  return 'fenced'
end
drained(job)
count_usage(job)
job.best = ARGV[6]
set(job.id, 'best', job.best, 'advanced', token, 'since_us', int(now_us()))
if job.cancel then return close(job, job.cancel, '') end
job.bucket, job.images, job.cost = job.lane .. '|' .. ARGV[3], ARGV[4], ARGV[5]
set(job.id, 'images', job.images, 'cost', job.cost)
local last = redis.call('ZSCORE', P .. 'f', job.key)
if last then redis.call('ZADD', P .. 'f', int(tonumber(last) + job.cost), job.key) end
charge(job)
return requeue(job, int(job.attempts - 1), false)
