-- '1' if the device failed under them, else '0'; max attempts; then pairs of (id, token): jobs that were claimed and not
-- drawn. No attempt is counted. A job that was on a device when it failed may be the reason: it travels alone from now
-- on, and where that has happened as often as there are attempts, they are counted after all.
-- → the number of jobs handed back.
local spared, max_attempts, returned = ARGV[1] == '1', tonumber(ARGV[2]), 0
for i = 3, #ARGV, 2 do
  local job = load(ARGV[i])
  if mine(job, ARGV[i + 1]) then
    if spared and redis.call('HINCRBY', P .. 'j:' .. job.id, 'spared', 1) > max_attempts then
      bury_or_requeue(job, max_attempts)
    else
      requeue(job, int(job.attempts - 1), spared)
    end
    returned = returned + 1
  end
end
return returned
