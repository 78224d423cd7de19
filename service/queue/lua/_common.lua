-- Prepended to every script. KEYS[1] is the prefix of all keys of one model; its hash tag keeps them in one slot.
--   j:<id>      hash    the job: the truth about it
--   a:<id>      set     the clients that wait for it on an open connection
--   i:<digest>  string  the job that an Idempotency-Key stands for
--   p:<bucket>  zset    waiting jobs of one bucket, by score (below)
--   b           zset    buckets that hold something, by the score of their head
--   pending     zset    every waiting job, by the time of its acceptance
--   work        int     the cost of everything that waits
--   l           zset    jobs that a worker holds, by the moment when its lease ends
--   d           zset    jobs that have not ended, by their deadline
--   ab          zset    jobs whose last client has gone, by the moment when they are given up
--   v, f        virtual time, and for each flow (priority and key) the virtual time at which its last job is over
--   rate        hash    work done and time that it took, of late: the drain rate
--   q:<key>     hash    what is left of a key's quota
--   w:<lane>    list    wake-up tokens for the workers of a lane
--   c:<worker>  string  the worker's last claim, so that a repeated call gets the same answer
--   wk, wi:<worker>     workers by the moment when they count as gone; what each says about itself
--   r:<api>     stream  notices for an API process: 'end' of a job that it accepted, 'look' at one that it watches
--   n           hash    counters: finished, redelivered, fenced, dead
--   m           hash    what is to become of each model, by <id>/<version> (only with FEWSTEP_MODELS)
--   ma          hash    the version of each model that 'latest' means
--   u:<day>     hash    what was drawn for each key on a day: <key>|jobs, |images, |work
--   secret:<x>  string  random bytes that the processes of a queue share;  turn:<x>  who does a duty now
--   dead        zset    jobs that were given up with their workers, by the moment of it: their records are kept a week
--   wh          zset    jobs whose webhook is still to be sent, by the moment of the next try
-- A bucket is <lane>|<size>|<steps>, with |solo behind it for a job that has been lost with a worker before.
-- All times are the server's, in microseconds: it is the only clock. A cost is in thousands of pixel-steps.
--
-- Order: start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996). A job of a flow starts where the flow's last one
-- is over, but not before the virtual time, which is the start of the job that was claimed last. So flows take turns by
-- cost, one that was idle has no claim on the past, and a score is fixed once. Priority lowers the score by a bounded
-- amount of work: that is how the others age.
local P = KEYS[1]
local CLAIM_KEPT_MS = 600000
local STREAM_KEPT_MS = 3600000
local WEEK_MS = 604800000
local RATE_OVER_US = 30000000
local DEAD_KEPT = 1000
local USAGE_KEPT_MS = 34560000000  -- 400 days

local function now_us()
  local t = redis.call('TIME')
  return t[1] * 1000000 + t[2]
end

-- Lua prints large numbers in scientific notation.
local function int(x)
  return string.format('%.0f', x)
end

local function keep(key, ms)
  ms = tonumber(ms)
  if redis.call('PTTL', key) < ms then redis.call('PEXPIRE', key, int(ms)) end
end

-- A bucket begins with its lane: three words.
local function lane_of(bucket)
  return string.match(bucket, '^[^|]*|[^|]*|[^|]*')
end

-- What is to become of a version ('none': it is not registered).
local function model_state(name)
  local entry = redis.call('HGET', P .. 'm', name)
  return entry and cjson.decode(entry).state or 'none'
end

local function index(bucket)
  local head = redis.call('ZRANGE', P .. 'p:' .. bucket, 0, 0, 'WITHSCORES')
  if head[1] then
    redis.call('ZADD', P .. 'b', head[2], bucket)
  else
    redis.call('ZREM', P .. 'b', bucket)
  end
end

local function push(id, bucket, ttl_ms)
  local job = redis.call('HMGET', P .. 'j:' .. id, 'score', 'created_us', 'cost')
  redis.call('HSET', P .. 'j:' .. id, 'state', 'queued', 'bucket', bucket)
  redis.call('ZADD', P .. 'p:' .. bucket, job[1], id)
  redis.call('ZADD', P .. 'pending', job[2], id)
  redis.call('INCRBY', P .. 'work', job[3])
  index(bucket)
  for _, key in ipairs({'p:' .. bucket, 'b', 'pending', 'work', 'l', 'd', 'ab'}) do keep(P .. key, 2 * ttl_ms) end
end

local function pull(id, bucket)
  redis.call('ZREM', P .. 'p:' .. bucket, id)
  local waited = redis.call('ZREM', P .. 'pending', id)
  if waited == 1 then redis.call('DECRBY', P .. 'work', redis.call('HGET', P .. 'j:' .. id, 'cost') or 0) end
  if redis.call('ZCARD', P .. 'pending') == 0 then redis.call('DEL', P .. 'work') end
  index(bucket)
end

local function wake(lane)
  local key = P .. 'w:' .. lane
  redis.call('LPUSH', key, 1)
  redis.call('LTRIM', key, 0, 63)
  redis.call('PEXPIRE', key, 60000)
end

local function notify(api, id, what)
  local stream = P .. 'r:' .. api
  redis.call('XADD', stream, 'MAXLEN', '~', 10000, '*', 'id', id, 'what', what)
  redis.call('PEXPIRE', stream, STREAM_KEPT_MS)
end

local function watchers(id)
  local apis = redis.call('HGET', P .. 'j:' .. id, 'watchers')
  return string.gmatch(apis or '', '%S+')
end

local function watch(id, api)
  for known in watchers(id) do
    if known == api then return end
  end
  local key = P .. 'j:' .. id
  redis.call('HSET', key, 'watchers', (redis.call('HGET', key, 'watchers') or '') .. api .. ' ')
end

local function tell_watchers(id, but)
  for api in watchers(id) do
    if api ~= but then notify(api, id, 'look') end
  end
end

local function close(id, state, result)
  local key = P .. 'j:' .. id
  local job = redis.call('HMGET', key, 'reply', 'ttl_ms', 'webhook')
  redis.call('HSET', key, 'state', state, 'result', result, 'finished_us', int(now_us()))
  redis.call('PEXPIRE', key, job[2])
  for _, set in ipairs({'l', 'd', 'ab'}) do redis.call('ZREM', P .. set, id) end
  redis.call('DEL', P .. 'a:' .. id)
  if job[3] then
    redis.call('ZADD', P .. 'wh', int(now_us()), id)
    keep(P .. 'wh', job[2])
  end
  redis.call('HINCRBY', P .. 'n', 'finished', 1)
  keep(P .. 'n', WEEK_MS)
  notify(job[1], id, 'end')
  tell_watchers(id, job[1])
end

-- End a job without a picture: one that waits at once, a running one when its worker notices the mark.
-- → 'missing' or the job's state afterwards. The first reason counts; what has ended stays as it is.
local function give_up(id, why)
  local key = P .. 'j:' .. id
  local job = redis.call('HMGET', key, 'state', 'bucket')
  for _, set in ipairs({'d', 'ab'}) do redis.call('ZREM', P .. set, id) end
  if job[1] == 'queued' then
    pull(id, job[2])
    close(id, why, '')
    return why
  end
  if job[1] == 'running' then redis.call('HSETNX', key, 'cancel', why) end
  return job[1] or 'missing'
end

-- Back to waiting, at its old place. A job that was given up while it ran ends here.
local function requeue(id, attempts, solo)
  local key = P .. 'j:' .. id
  local job = redis.call('HMGET', key, 'bucket', 'ttl_ms', 'lane', 'cancel')
  redis.call('ZREM', P .. 'l', id)
  redis.call('HSET', key, 'attempts', attempts)
  if job[4] then return close(id, job[4], '') end
  local bucket = job[1]
  if solo and string.sub(bucket, -5) ~= '|solo' then bucket = bucket .. '|solo' end
  push(id, bucket, tonumber(job[2]))
  wake(job[3])
end

-- A job that was lost with its worker: it may have been the reason, so from now on it travels alone.
local function bury_or_requeue(id, max_attempts)
  local job = redis.call('HMGET', P .. 'j:' .. id, 'state', 'attempts', 'cancel')
  if job[1] ~= 'running' then
    redis.call('ZREM', P .. 'l', id)
    return
  end
  if job[3] or tonumber(job[2]) < max_attempts then
    redis.call('HINCRBY', P .. 'n', 'redelivered', 1)
    return requeue(id, job[2], true)
  end
  redis.call('HINCRBY', P .. 'n', 'dead', 1)
  close(id, 'failed', cjson.encode({error = {
    code = 'worker_lost', message = 'The worker died ' .. job[2] .. ' times while it drew this.'}}))
  redis.call('ZADD', P .. 'dead', int(now_us()), id)
  redis.call('ZREMRANGEBYRANK', P .. 'dead', 0, -1 - DEAD_KEPT)
  redis.call('ZREMRANGEBYSCORE', P .. 'dead', '-inf', int(now_us() - WEEK_MS * 1000))
  for _, kept in ipairs({'dead', 'j:' .. id}) do keep(P .. kept, WEEK_MS) end
end

local function due(set, limit)
  return redis.call('ZRANGEBYSCORE', P .. set, '-inf', int(now_us()), 'LIMIT', 0, limit)
end

local function reap(limit, max_attempts)
  for _, id in ipairs(due('d', limit)) do give_up(id, 'expired') end
  for _, id in ipairs(due('ab', limit)) do give_up(id, 'cancelled') end
  local lost = due('l', limit)
  for _, id in ipairs(lost) do bury_or_requeue(id, max_attempts) end
  return #lost
end

-- True if the job is still this worker's: a worker that was taken for dead finds another token.
local function mine(id, token)
  local job = redis.call('HMGET', P .. 'j:' .. id, 'state', 'token')
  return job[1] == 'running' and job[2] == token, job[1], job[2]
end

-- The number of waiting jobs that come before a score.
local function ahead_of(score)
  local count = 0
  for _, bucket in ipairs(redis.call('ZRANGE', P .. 'b', 0, -1)) do
    count = count + redis.call('ZCOUNT', P .. 'p:' .. bucket, '-inf', '(' .. score)
  end
  return count
end

-- How long so many of the waiting jobs will take, in milliseconds, at the drain rate of late; 0 while it is unknown.
local function drain_ms(jobs)
  local rate = redis.call('HMGET', P .. 'rate', 'work', 'busy_us')
  local waiting = redis.call('ZCARD', P .. 'pending')
  if jobs == 0 or waiting == 0 or not rate[1] or tonumber(rate[1]) <= 0 then return 0 end
  local work = tonumber(redis.call('GET', P .. 'work') or 0) * jobs / waiting
  return work * tonumber(rate[2]) / tonumber(rate[1]) / 1000
end

-- Count what was drawn for a key, by day (UTC).
local function count_usage(id)
  local job = redis.call('HMGET', P .. 'j:' .. id, 'key', 'images', 'cost')
  local used = P .. 'u:' .. int(math.floor(now_us() / 86400000000))
  redis.call('HINCRBY', used, job[1] .. '|jobs', 1)
  redis.call('HINCRBY', used, job[1] .. '|images', job[2])
  redis.call('HINCRBY', used, job[1] .. '|work', job[3])
  keep(used, USAGE_KEPT_MS)
end

-- Note that a job's work is done. Its time is what passed since the last one was, or since it was claimed: so the times
-- of workers side by side, and of batch mates, add up to time that passed once.
local function drained(id)
  local job = redis.call('HMGET', P .. 'j:' .. id, 'cost', 'claimed_us')
  local key, now = P .. 'rate', now_us()
  local last = tonumber(redis.call('HGET', key, 'last_us') or 0)
  local work = redis.call('HINCRBY', key, 'work', job[1])
  local busy = redis.call('HINCRBY', key, 'busy_us', int(math.max(0, now - math.max(last, tonumber(job[2])))))
  redis.call('HSET', key, 'last_us', int(now))
  if busy > RATE_OVER_US then redis.call('HSET', key, 'work', int(work / 2), 'busy_us', int(busy / 2)) end
  redis.call('PEXPIRE', key, WEEK_MS)
end
