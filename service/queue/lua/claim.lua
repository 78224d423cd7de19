-- worker, claim id, JSON of {lane: the most images that a batch of it holds}, lease_ms, max attempts
-- → {now_us, token, {{id, payload, attempts, created_us}, …}}: waiting jobs of one bucket, in order.
-- The same claim id gets the same jobs again (those that are still held), never more.
local worker, claim_id, lanes = ARGV[1], ARGV[2], cjson.decode(ARGV[3])
local lease_ms, max_attempts = tonumber(ARGV[4]), tonumber(ARGV[5])
local claim_key = P .. 'c:' .. worker

local function answer(token, ids)
  local jobs = {}
  for _, id in ipairs(ids) do
    local job = redis.call('HMGET', P .. 'j:' .. id, 'payload', 'attempts', 'created_us')
    jobs[#jobs + 1] = {id, job[1], job[2], job[3]}
  end
  return {int(now_us()), token, jobs}
end

local last = redis.call('GET', claim_key)
last = last and cjson.decode(last)
if last and last.claim_id == claim_id then
  local held = {}
  for _, id in ipairs(last.ids) do
    if mine(id, last.token) then held[#held + 1] = id end
  end
  return answer(last.token, held)
end

reap(32, max_attempts)

local function first_bucket()
  for _, bucket in ipairs(redis.call('ZRANGE', P .. 'b', 0, -1)) do
    if lanes[lane_of(bucket)] then return bucket end
  end
end

local function nothing_waits()
  for lane in pairs(lanes) do redis.call('DEL', P .. 'w:' .. lane) end
end

local bucket = first_bucket()
if not bucket then
  nothing_waits()
  return {int(now_us()), '0', {}}
end
local ids, images, now, max_images = {}, 0, now_us(), 1
-- Not a mere counter: a server that lost its data, or a replica that lags, would give out a token a second time.
local token = int(math.max(now, tonumber(redis.call('GET', P .. 'token') or 0) + 1))
redis.call('SET', P .. 'token', token, 'PX', WEEK_MS)
local virtual = tonumber(redis.call('GET', P .. 'v') or 0)

-- False ends the batch: the job does not fit into it any more.
local function take(id, bucket)
  local key = P .. 'j:' .. id
  local job = redis.call('HMGET', key, 'state', 'images', 'deadline_us', 'attempts', 'start')
  if job[1] ~= 'queued' then
    pull(id, bucket)
  elseif tonumber(job[3]) <= now then
    pull(id, bucket)
    close(id, 'expired', '')
  elseif #ids > 0 and images + tonumber(job[2]) > max_images then
    return false
  else
    pull(id, bucket)
    redis.call('HSET', key, 'state', 'running', 'token', token, 'worker', worker, 'claimed_us', int(now),
      'attempts', tonumber(job[4]) + 1)
    redis.call('ZADD', P .. 'l', int(now + lease_ms * 1000), id)
    if tonumber(job[5]) > virtual then virtual = tonumber(job[5]) end
    tell_watchers(id)
    ids[#ids + 1] = id
    images = images + tonumber(job[2])
  end
  return true
end

while bucket do
  local solo = string.sub(bucket, -5) == '|solo'
  max_images = math.max(1, lanes[lane_of(bucket)])
  local fits = true
  while fits and images < max_images and not (solo and #ids > 0) do
    local head = redis.call('ZRANGE', P .. 'p:' .. bucket, 0, 0)[1]
    if not head then break end
    fits = take(head, bucket)
  end
  if #ids > 0 then break end
  bucket = first_bucket()
end

if not first_bucket() then nothing_waits() end
if #ids == 0 then return {int(now), token, {}} end
keep(P .. 'l', lease_ms * 2)
redis.call('SET', P .. 'v', int(virtual), 'PX', WEEK_MS)
redis.call('ZREMRANGEBYSCORE', P .. 'f', '-inf', int(virtual))
redis.call('SET', claim_key, cjson.encode({claim_id = claim_id, token = token, ids = ids}), 'PX', CLAIM_KEPT_MS)
return answer(token, ids)
