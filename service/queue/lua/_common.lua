-- Prepended to every script. KEYS[1] is the prefix of all keys of one model; its hash tag keeps them in one slot.
--   j:<id>      hash    the job: the truth about it
--   p:<bucket>  zset    waiting jobs of one bucket, by score (the time of acceptance, in microseconds)
--   b           zset    buckets that hold something, by the score of their head
--   pending     zset    every waiting job, by score
--   l           zset    jobs that a worker holds, by the moment when its lease ends
--   w:<lane>    list    wake-up tokens for the workers of a lane
--   c:<worker>  string  the worker's last claim, so that a repeated call gets the same answer
--   wk, wi:<worker>     workers by the moment when they count as gone; what each says about itself
--   r:<api>     stream  ids of finished jobs, for the API process that accepted them
--   n           hash    counters: finished, redelivered, fenced, dead
--   dlq         stream  jobs that were given up
-- A bucket is <lane>|<size>|<steps>, with |solo behind it for a job that has been lost with a worker before.
-- All times are the server's, in microseconds: it is the only clock.
local P = KEYS[1]
local CLAIM_KEPT_MS = 600000
local STREAM_KEPT_MS = 3600000
local WEEK_MS = 604800000

local function now_us()
  local t = redis.call('TIME')
  return t[1] * 1000000 + t[2]
end

-- Lua prints large numbers in scientific notation.
local function int(x)
  return string.format('%.0f', x)
end

local function keep(key, ms)
  if redis.call('PTTL', key) < ms then redis.call('PEXPIRE', key, int(ms)) end
end

local function index(bucket)
  local head = redis.call('ZRANGE', P .. 'p:' .. bucket, 0, 0, 'WITHSCORES')
  if head[1] then
    redis.call('ZADD', P .. 'b', head[2], bucket)
  else
    redis.call('ZREM', P .. 'b', bucket)
  end
end

local function push(id, bucket, score, ttl_ms)
  redis.call('HSET', P .. 'j:' .. id, 'state', 'queued', 'bucket', bucket)
  redis.call('ZADD', P .. 'p:' .. bucket, score, id)
  redis.call('ZADD', P .. 'pending', score, id)
  index(bucket)
  for _, key in ipairs({'p:' .. bucket, 'b', 'pending', 'l'}) do keep(P .. key, 2 * ttl_ms) end
end

local function pull(id, bucket)
  redis.call('ZREM', P .. 'p:' .. bucket, id)
  redis.call('ZREM', P .. 'pending', id)
  index(bucket)
end

local function wake(lane)
  local key = P .. 'w:' .. lane
  redis.call('LPUSH', key, 1)
  redis.call('LTRIM', key, 0, 63)
  redis.call('PEXPIRE', key, 60000)
end

local function close(id, state, result)
  local key = P .. 'j:' .. id
  local job = redis.call('HMGET', key, 'reply', 'ttl_ms')
  redis.call('HSET', key, 'state', state, 'result', result, 'finished_us', int(now_us()))
  redis.call('PEXPIRE', key, job[2])
  redis.call('ZREM', P .. 'l', id)
  redis.call('HINCRBY', P .. 'n', 'finished', 1)
  keep(P .. 'n', WEEK_MS)
  local stream = P .. 'r:' .. job[1]
  redis.call('XADD', stream, 'MAXLEN', '~', 10000, '*', 'id', id)
  redis.call('PEXPIRE', stream, STREAM_KEPT_MS)
end

-- Back to waiting, at its old place. A job whose cancellation came while it ran ends here.
local function requeue(id, attempts, solo)
  local key = P .. 'j:' .. id
  local job = redis.call('HMGET', key, 'bucket', 'score', 'ttl_ms', 'lane', 'cancel')
  redis.call('ZREM', P .. 'l', id)
  redis.call('HSET', key, 'attempts', attempts)
  if job[5] then return close(id, 'cancelled', '') end
  local bucket = job[1]
  if solo and string.sub(bucket, -5) ~= '|solo' then bucket = bucket .. '|solo' end
  push(id, bucket, job[2], tonumber(job[3]))
  wake(job[4])
end

-- A job that was lost with its worker: it may have been the reason, so from now on it travels alone.
local function bury_or_requeue(id, max_attempts)
  local job = redis.call('HMGET', P .. 'j:' .. id, 'state', 'attempts', 'worker')
  if job[1] ~= 'running' then
    redis.call('ZREM', P .. 'l', id)
    return
  end
  if tonumber(job[2]) < max_attempts then
    redis.call('HINCRBY', P .. 'n', 'redelivered', 1)
    return requeue(id, job[2], true)
  end
  redis.call('HINCRBY', P .. 'n', 'dead', 1)
  redis.call('XADD', P .. 'dlq', 'MAXLEN', '~', 1000, '*', 'id', id, 'attempts', job[2], 'worker', job[3])
  redis.call('PEXPIRE', P .. 'dlq', WEEK_MS)
  close(id, 'failed', cjson.encode({error = {
    code = 'worker_lost', message = 'The worker died ' .. job[2] .. ' times while it drew this.'}}))
end

local function reap(limit, max_attempts)
  local lost = redis.call('ZRANGEBYSCORE', P .. 'l', '-inf', int(now_us()), 'LIMIT', 0, limit)
  for _, id in ipairs(lost) do bury_or_requeue(id, max_attempts) end
  return #lost
end

-- True if the job is still this worker's: a worker that was taken for dead finds another token.
local function mine(id, token)
  local job = redis.call('HMGET', P .. 'j:' .. id, 'state', 'token')
  return job[1] == 'running' and job[2] == token, job[1], job[2]
end
