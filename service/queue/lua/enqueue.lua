-- One JSON object: the job's id, lane, shape, images, payload, key, priority, cost and bonus; who wants it: reply (the
-- API process), watch (true: it wants to hear of more than the end), client ('' for nobody on an open connection), idem
-- ('' or the digest of an Idempotency-Key and its owner), body (digest of what was asked); limits: timeout_ms, ttl_ms,
-- max_pending, key_pending (jobs of one key that may wait, 0: no bound of its own), quota (cost a minute, 0 for none);
-- webhook: '' or what is to be sent where at its end; model: '' or the <id>/<version> that must be served for it; solo
-- (true: it must not share a batch); open_ended (true: its client waits for it, and has not said for how long).
-- → {verdict, id, ms, left}: 'ok'; 'known' (repeating a call changes nothing: the id is chosen by the caller);
-- 'attached' to job id, which the Idempotency-Key stands for; or refused: 'mismatch' (of the body), 'quota', 'full',
-- 'key_full', 'late' (it would not be done within its timeout), 'left' (clients of the key have not waited as long as
-- it would take), with the ms after which it is worth another try; or
-- 'gone': the model is served no more. left is what is left of the quota, whatever the verdict.
local OWN_KEPT = 1000
local ROOM = 0.1  -- whoever finds no place comes back when so much of them is free, not just one
local a = cjson.decode(ARGV[1])
local now, kept_ms = now_us(), a.timeout_ms + a.ttl_ms

local function attach(id, job)
  if a.client ~= '' then
    redis.call('SADD', P .. 'a:' .. id, a.client)
  elseif job then
    set(id, 'detached', 1)
  end
  if job then
    redis.call('ZREM', P .. 'ab', id)
    watch(job, a.reply)
  end
end

-- So that it can be listed by its owner: the newest only.
local function own(id, owner, since)
  local list = P .. 'k:' .. owner
  redis.call('ZADD', list, int(since), id)
  redis.call('ZREMRANGEBYRANK', list, 0, -1 - OWN_KEPT)
  redis.call('PEXPIRE', list, int(math.max(kept_ms, WEEK_MS)))
end

local left = 0
if a.quota > 0 then
  local q = redis.call('HMGET', P .. 'q:' .. a.key, 'left', 'at_us')
  left = math.min(a.quota, tonumber(q[1] or a.quota) + (now - tonumber(q[2] or now)) * a.quota / 60000000)
end

local function verdict(word, id, ms)
  return {word, id, int(ms or 0), int(left)}
end

if redis.call('EXISTS', P .. 'j:' .. a.id) == 1 then return verdict('known', a.id) end
if a.idem ~= '' then
  local other = redis.call('GET', P .. 'i:' .. a.idem)
  local job = other and load(other) or {}
  local body = job.state and redis.call('HGET', P .. 'j:' .. other, 'body')
  if job.state and body ~= a.body then return verdict('mismatch', other) end
  local lives = job.state == 'queued' or job.state == 'running' and not job.cancel
  if lives then attach(other, job) end
  -- What ended without a picture is tried anew.
  if lives or job.state == 'done' then return verdict('attached', other) end
end

if a.model ~= '' then
  -- A server that has lost its data will be filled again with what is served.
  if model_state(a.model) ~= 'serving' and redis.call('EXISTS', P .. 'm') == 1 then return verdict('gone', a.id) end
end

if a.quota > 0 then
  local needed = math.min(a.cost, a.quota)  -- a job larger than the whole quota needs all of it, and leaves a debt
  if left < needed then return verdict('quota', a.id, math.ceil((needed - left) / a.quota * 60000)) end
end

local waiting = redis.call('ZCARD', P .. 'pending')
if waiting >= a.max_pending then
  return verdict('full', a.id, drain_ms(math.ceil(ROOM * a.max_pending), waiting))
end

-- How many jobs of the key wait, and whether one of a lower priority is among them.
local mine_waiting, lower = 0, false
if waiting > 0 then
  local fields = {}
  for priority = LOWEST, HIGHEST do fields[#fields + 1] = a.key .. '|' .. priority end
  for i, count in ipairs(redis.call('HMGET', P .. 'kc', unpack(fields))) do
    mine_waiting = mine_waiting + (tonumber(count or 0))
    lower = lower or (tonumber(count or 0) > 0 and LOWEST + i - 1 < a.priority)
  end
end
if a.key_pending > 0 and mine_waiting >= a.key_pending then
  local room = math.ceil(ROOM * a.key_pending) * waiting / math.max(1, mine_waiting)  -- the others have their turns, too
  return verdict('key_full', a.id, drain_ms(math.ceil(room), waiting))
end

-- Inside a key the higher priority comes first: the waiting jobs of the key that it overtakes, in their order.
local function overtaken()
  local jobs = {}
  for _, id in ipairs(redis.call('ZRANGE', P .. 'o', 0, -1)) do
    local found = redis.call('HMGET', P .. 'j:' .. id, 'key', 'priority')
    if found[1] == a.key and tonumber(found[2] or 0) < a.priority then jobs[#jobs + 1] = load(id) end
  end
  table.sort(jobs, function(x, y)
    if tonumber(x.start) ~= tonumber(y.start) then return tonumber(x.start) < tonumber(y.start) end
    return tonumber(x.created_us) < tonumber(y.created_us)
  end)
  return jobs
end

-- Each of them moves back by what goes ahead; the key as a whole gets no other turn than before.
local function move_back(jobs, start)
  for _, job in ipairs(jobs) do
    local score = int(start - (tonumber(job.start) - tonumber(job.score)))
    set(job.id, 'start', int(start), 'score', score)
    redis.call('ZADD', P .. 'p:' .. job.bucket, score, job.id)
    redis.call('ZADD', P .. 'o', score, job.id)
    index(job.bucket)
    start = start + tonumber(job.cost)
  end
  return start
end

local virtual = tonumber(redis.call('GET', P .. 'v') or 0)
local start = math.max(virtual, tonumber(redis.call('ZSCORE', P .. 'f', a.key) or 0))
local behind = lower and overtaken() or {}
if behind[1] then start = tonumber(behind[1].start) end
local score = int(start - a.bonus)
local wait_ms, expected_ms, ahead = 0, 0, 0
if waiting > 0 then
  ahead = ahead_of(score)
  local job_ms = drain_ms(waiting, waiting) / waiting
  wait_ms = job_ms * math.min(ahead, waiting)
  local pace = ahead > 0 and pace_of(redis.call('HGET', P .. 'rt', a.lane)) or 0
  -- What workers hold already has begun: about half of it is still to be done.
  local begun_ms = job_ms * redis.call('ZCARD', P .. 'l') / 2
  expected_ms = wait_ms + begun_ms + a.cost * pace / 1000
  local taken_ms = expected_ms * delay_factor()
  if taken_ms > a.timeout_ms then return verdict('late', a.id, taken_ms - a.timeout_ms) end
  local beyond_ms = a.open_ended and beyond_patience_ms(a.key, taken_ms) or 0
  if beyond_ms > 0 then return verdict('left', a.id, beyond_ms) end
end

local bucket = a.lane .. '|' .. a.shape .. (a.solo and '|solo' or '')
local job = {
  id = a.id, lane = a.lane, key = a.key, priority = int(a.priority), cost = int(a.cost), score = score,
  created_us = int(now),
}
local fields = {
  'state', 'queued', 'bucket', bucket, 'lane', a.lane, 'images', a.images, 'payload', a.payload, 'reply', a.reply,
  'key', a.key, 'priority', job.priority, 'cost', job.cost, 'start', int(start), 'score', score, 'created_us', int(now),
  'attempts', 0, 'body', a.body, 'deadline_us', int(now + a.timeout_ms * 1000), 'ttl_ms', int(a.ttl_ms),
}
local function also(name, value)
  fields[#fields + 1] = name
  fields[#fields + 1] = value
end
if a.webhook ~= '' then also('webhook', a.webhook) end
if (a.pair or '') ~= '' then also('pair', a.pair) end
if a.client == '' then also('detached', 1) end
if a.open_ended then also('open_ended', 1) end
if a.watch then also('watchers', a.reply .. ' ') end
if a.quota > 0 then also('charged', job.cost) end
if expected_ms > 0 then
  also('expected_ms', int(expected_ms))
  also('ahead', int(ahead))
end
if a.idem ~= '' then also('idem', a.idem) end
set(a.id, unpack(fields))
redis.call('PEXPIRE', P .. 'j:' .. a.id, int(kept_ms))
own(a.id, a.key, now)
attach(a.id)
if a.idem ~= '' then redis.call('SET', P .. 'i:' .. a.idem, a.id, 'PX', int(kept_ms)) end
if a.quota > 0 then
  left = left - a.cost
  redis.call('HSET', P .. 'q:' .. a.key, 'left', int(left), 'at_us', int(now))
  redis.call('PEXPIRE', P .. 'q:' .. a.key, int(math.max(1, math.ceil((a.quota - left) / a.quota)) * 60000))
end
redis.call('ZADD', P .. 'f', int(move_back(behind, start + a.cost)), a.key)
redis.call('ZADD', P .. 'd', int(now + a.timeout_ms * 1000), a.id)
push(job, bucket)
arrived(a.lane, a.cost)
wake(a.lane)
return verdict('ok', a.id, wait_ms)
