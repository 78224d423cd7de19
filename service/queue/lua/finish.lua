-- id, token, 'done' | 'failed', result, for how many ms the worker is trusted to hand in scores later (0: none follow),
-- notes → the job's state if this claim ended it (now or by an earlier call), else 'fenced'. Notes are JSON of what is to
-- be counted with the job's end (see _common.lua), so that it is counted once.
local token, state, result, scores_ms = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5] or 0)
local notes = cjson.decode(ARGV[6] or '{}')
local job = load(ARGV[1])
if not mine(job, token) then
  if job.state and job.state ~= 'queued' and job.state ~= 'running' and job.token == token then return job.state end
  redis.call('HINCRBY', P .. 'n', 'fenced', 1)
  return 'fenced'
end
if state == 'done' then
  drained(job)
  if not job.cancel then
    learn_delay(job)
    learn_patience(job, false)
  end
end
if job.cancel then state, result = job.cancel, '' end
if state == 'done' then
  count_usage(job)
  count_notes(job, notes)
end
if state == 'done' and scores_ms > 0 then
  job.scoring = 'pending'
  set(job.id, 'scoring', 'pending')
  owe_scores(job.id, scores_ms)
end
return close(job, state, result, notes.half)
