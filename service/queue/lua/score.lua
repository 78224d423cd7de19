-- id, token, scores, notes: those of a job that is done, which its worker has handed in later than the pictures
-- → 'done' if the record has them (now or by an earlier call), else 'fenced': they count as lost, or the record has gone.
local job = load(ARGV[1])
local notes = cjson.decode(ARGV[4] or '{}')
if job.token == ARGV[2] and job.scoring == 'done' then return 'done' end
if not owes_scores(job, ARGV[2]) then
  redis.call('HINCRBY', P .. 'n', 'fenced', 1)
  return 'fenced'
end
end_scoring(job, 'done', ARGV[3])
count_notes(job, notes)
if job.pair then pair_up(job, 'done', notes.half) end
return 'done'
