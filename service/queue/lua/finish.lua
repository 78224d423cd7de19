-- id, token, 'done' | 'failed', result → the job's state if this claim ended it (now or by an earlier call), else 'fenced'.
local token, state, result = ARGV[2], ARGV[3], ARGV[4]
local job = load(ARGV[1])
if not mine(job, token) then
  if job.state and job.state ~= 'queued' and job.state ~= 'running' and job.token == token then return job.state end
  redis.call('HINCRBY', P .. 'n', 'fenced', 1)
  return 'fenced'
end
if state == 'done' then drained(job) end
if job.cancel then state, result = job.cancel, '' end
if state == 'done' then count_usage(job) end
return close(job, state, result)
