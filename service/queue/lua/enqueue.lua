-- One JSON object: the job's id, lane, shape, images, payload, key, cost, flow and bonus; who wants it: reply (the API
-- process), watch (true: it wants to hear of more than the end), client ('' for nobody on an open connection), idem
-- ('' or the digest of an Idempotency-Key and its owner), body (digest of what was asked); limits: timeout_ms, ttl_ms,
-- max_pending, quota (cost a minute, 0 for none); webhook: '' or what is to be sent where at its end; model: '' or the
-- <id>/<version> that must be served for it; solo (true: it must not share a batch).
-- → {verdict, id, ms, left}: 'ok'; 'known' (repeating a call changes nothing: the id is chosen by the caller);
-- 'attached' to job id, which the Idempotency-Key stands for; or refused: 'mismatch' (of the body), 'quota', 'full',
-- 'late' (it would wait longer than its timeout), with the ms after which it is worth another try; or 'gone': the model
-- is served no more. left is what is left of the quota, whatever the verdict.
local OWN_KEPT = 1000
local a = cjson.decode(ARGV[1])
local key, now = P .. 'j:' .. a.id, now_us()

local function attach(id)
  if a.client == '' then
    redis.call('HSET', P .. 'j:' .. id, 'detached', 1)
  else
    redis.call('SADD', P .. 'a:' .. id, a.client)
    redis.call('PEXPIRE', P .. 'a:' .. id, int(a.timeout_ms + a.ttl_ms))
  end
  redis.call('ZREM', P .. 'ab', id)
  if a.watch or id ~= a.id then watch(id, a.reply) end
end

-- So that it can be listed by its owner: the newest only, and no longer than its record lives.
local function own(id, owner, since)
  local list, kept_ms = P .. 'k:' .. owner, a.timeout_ms + a.ttl_ms
  redis.call('ZADD', list, int(since), id)
  redis.call('ZREMRANGEBYRANK', list, 0, -1 - OWN_KEPT)
  keep(list, kept_ms)
end

local left = 0
if a.quota > 0 then
  local q = redis.call('HMGET', P .. 'q:' .. a.key, 'left', 'at_us')
  left = math.min(a.quota, tonumber(q[1] or a.quota) + (now - tonumber(q[2] or now)) * a.quota / 60000000)
end

if redis.call('EXISTS', key) == 1 then return {'known', a.id, 0, int(left)} end
if a.idem ~= '' then
  local other = redis.call('GET', P .. 'i:' .. a.idem)
  local job = other and redis.call('HMGET', P .. 'j:' .. other, 'state', 'body', 'cancel') or {}
  if job[1] and job[2] ~= a.body then return {'mismatch', other, 0, int(left)} end
  local lives = job[1] == 'queued' or job[1] == 'running' and not job[3]
  if lives then attach(other) end
  -- What ended without a picture is tried anew.
  if lives or job[1] == 'done' then return {'attached', other, 0, int(left)} end
end

if a.model ~= '' then
  -- A server that has lost its data will be told again what is served.
  if model_state(a.model) ~= 'serving' and redis.call('EXISTS', P .. 'm') == 1 then return {'gone', a.id, 0, int(left)} end
end

if a.quota > 0 then
  local needed = math.min(a.cost, a.quota)  -- a job larger than the whole quota needs all of it, and leaves a debt
  if left < needed then return {'quota', a.id, int(math.ceil((needed - left) / a.quota * 60000)), int(left)} end
end
local waiting = redis.call('ZCARD', P .. 'pending')
if waiting >= a.max_pending then return {'full', a.id, int(drain_ms(waiting)), int(left)} end
local start = math.max(tonumber(redis.call('GET', P .. 'v') or 0), tonumber(redis.call('ZSCORE', P .. 'f', a.flow) or 0))
local score = int(start - a.bonus)
local wait_ms = drain_ms(ahead_of(score))
if wait_ms > a.timeout_ms then return {'late', a.id, int(wait_ms - a.timeout_ms), int(left)} end

redis.call('HSET', key, 'lane', a.lane, 'images', a.images, 'payload', a.payload, 'reply', a.reply, 'key', a.key,
  'cost', int(a.cost), 'start', int(start), 'score', score, 'created_us', int(now), 'attempts', 0, 'body', a.body,
  'deadline_us', int(now + a.timeout_ms * 1000), 'ttl_ms', int(a.ttl_ms))
redis.call('PEXPIRE', key, int(a.timeout_ms + a.ttl_ms))
if a.webhook ~= '' then redis.call('HSET', key, 'webhook', a.webhook) end
if a.idem ~= '' then redis.call('HSET', key, 'idem', a.idem) end
own(a.id, a.key, now)
attach(a.id)
if a.idem ~= '' then redis.call('SET', P .. 'i:' .. a.idem, a.id, 'PX', int(a.timeout_ms + a.ttl_ms)) end
if a.quota > 0 then
  left = left - a.cost
  redis.call('HSET', P .. 'q:' .. a.key, 'left', int(left), 'at_us', int(now))
  redis.call('PEXPIRE', P .. 'q:' .. a.key, int(math.max(1, math.ceil((a.quota - left) / a.quota)) * 60000))
end
redis.call('ZADD', P .. 'f', int(start + a.cost), a.flow)
keep(P .. 'f', WEEK_MS)
redis.call('ZADD', P .. 'd', int(now + a.timeout_ms * 1000), a.id)
push(a.id, a.lane .. '|' .. a.shape .. (a.solo and '|solo' or ''), a.timeout_ms + a.ttl_ms)
wake(a.lane)
return {'ok', a.id, int(wait_ms), int(left)}
