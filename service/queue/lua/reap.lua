-- max attempts → the number of jobs whose lease had run out. Once a minute it also keeps what the jobs need.
local SHARED = {'b', 'o', 'pending', 'wl', 'kc', 'l', 'd', 'sc', 'ab', 'f', 'v', 'token', 'rt', 'ar', 'n'}
local lost = reap(1000, tonumber(ARGV[1]))

-- An older release beside this one puts jobs into the queue, and takes some out, without counting them: count again.
local function count_again()
  redis.call('DEL', P .. 'o', P .. 'wl', P .. 'kc')
  for _, id in ipairs(redis.call('ZRANGE', P .. 'pending', 0, -1)) do
    local job = load(id)
    if job.state == 'queued' then
      redis.call('ZADD', P .. 'o', job.score, id)
      count_waiting(job, 1)
    else
      forget(id)
    end
  end
end

local waiting = redis.call('ZCARD', P .. 'pending')
if waiting == 0 or redis.call('ZCARD', P .. 'o') ~= waiting then count_again() end
if redis.call('SET', P .. 'kept', 1, 'NX', 'PX', 60000) then
  redis.call('ZREMRANGEBYSCORE', P .. 'f', '-inf', redis.call('GET', P .. 'v') or 0)
  for _, name in ipairs(SHARED) do keep(P .. name, WEEK_MS) end
  for _, bucket in ipairs(redis.call('ZRANGE', P .. 'b', 0, -1)) do keep(P .. 'p:' .. bucket, WEEK_MS) end
end
return lost
