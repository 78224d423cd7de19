-- id, token, scores: those of a job that is done, which its worker has handed in later than the pictures
-- → 'done' if the record has them (now or by an earlier call), else 'fenced': they count as lost, or the record has gone.
local job = load(ARGV[1])
if job.token == ARGV[2] and job.scoring == 'done' then return 'done' end
if not owes_scores(job, ARGV[2]) then
  redis.call('HINCRBY', P .. 'n', 'fenced', 1)
  return 'fenced'
end
end_scoring(job, 'done', ARGV[3])
return 'done'
