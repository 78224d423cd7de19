-- worker, then pairs of (id, token): the worker leaves and hands back what it holds, without an attempt being counted.
-- Scores that it still owes count as lost.
-- → the number of jobs handed back.
local worker, released = ARGV[1], 0
for i = 2, #ARGV, 2 do
  local job = load(ARGV[i])
  if mine(job, ARGV[i + 1]) then
    requeue(job, int(job.attempts - 1), false)
    released = released + 1
  elseif owes_scores(job, ARGV[i + 1]) then
    lose_scores(job)
  end
end
redis.call('ZREM', P .. 'wk', worker)
redis.call('DEL', P .. 'wi:' .. worker, P .. 'wo:' .. worker)
return released
