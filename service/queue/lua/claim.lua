-- worker, claim id, JSON of {lane: the most images that a batch of it holds}, lease_ms, JSON of {bucket: the images of a
-- batch when 1, 2, … images wait, the last for any more}
-- → {now_us, token, {{id, payload, attempts, waiting since (µs), best}, …}}: waiting jobs of one bucket, in order; best
-- is what an earlier round of the job has left, '' if there was none.
-- The same claim id gets the same jobs again (those that are still held), never more. A worker that an operator has paused
-- or drains gets none.
local worker, claim_id, lanes, lease_ms = ARGV[1], ARGV[2], cjson.decode(ARGV[3]), tonumber(ARGV[4])
local sizes = cjson.decode(ARGV[5])
local claim_key = P .. 'c:' .. worker

local function answer(token, jobs)
  local rows = {}
  for i, job in ipairs(jobs) do
    rows[i] = {job.id, job.payload, job.attempts, job.since_us or job.created_us, job.best or ''}
  end
  return {int(now_us()), token, rows}
end

local last = redis.call('GET', claim_key)
last = last and cjson.decode(last)
if last and last.claim_id == claim_id then
  local held = {}
  for _, id in ipairs(last.ids) do
    local job = load(id)
    if mine(job, last.token) then held[#held + 1] = job end
  end
  return answer(last.token, held)
end

if redis.call('EXISTS', P .. 'wo:' .. worker) == 1 then return {int(now_us()), '0', {}} end

-- The bucket of these lanes whose head comes first.
local MOST_TURNS = 64  -- buckets of which nothing is left to draw: a script must end, whatever it finds

local function first_bucket()
  for _, bucket in ipairs(redis.call('ZRANGE', P .. 'b', 0, -1)) do
    if lanes[lane_of(bucket)] then return bucket end
  end
end

-- The images of a batch, by how many wait; of those, nothing is known but the first job's.
local function wanted(bucket, largest, images)
  local by_waiting = sizes[bucket]
  if not by_waiting or #by_waiting == 0 then return largest end
  local waiting = images * redis.call('ZCARD', P .. 'p:' .. bucket)
  return math.min(largest, by_waiting[math.min(waiting, #by_waiting)])
end

-- Take a batch from the head of a bucket, and what cannot be drawn any more out of its way.
-- → the jobs, and the score of the first.
local function fill(bucket)
  local largest = math.max(1, lanes[lane_of(bucket)])
  local most = largest
  local solo = string.sub(bucket, -5) == '|solo'
  local jobs, late, images, head, after = {}, {}, 0, nil, nil
  local found = redis.call('ZRANGE', P .. 'p:' .. bucket, 0, largest, 'WITHSCORES')
  local gone = {}
  for i = 1, #found, 2 do
    local full = images >= most or (solo and #jobs > 0)
    local job = not full and load(found[i])
    local fits = job and (#jobs == 0 or images + tonumber(job.images or 0) <= most)
    if not fits then
      after = found[i + 1]
      break
    elseif job.state ~= 'queued' then
      gone[#gone + 1] = job
    elseif tonumber(job.deadline_us) <= now_us() then
      late[#late + 1] = job
    else
      if #jobs == 0 then most = wanted(bucket, largest, tonumber(job.images)) end
      jobs[#jobs + 1] = job
      images = images + tonumber(job.images)
      head = head or tonumber(found[i + 1])
    end
  end
  for _, job in ipairs(late) do close_waiting(job, 'expired') end
  if #gone > 0 then withdraw(bucket, gone) end
  if #jobs > 0 then withdraw(bucket, jobs) end
  if after and #late == 0 then
    redis.call('ZADD', P .. 'b', after, bucket)
  elseif #found <= 2 * largest and #late == 0 then
    redis.call('ZREM', P .. 'b', bucket)
  else
    index(bucket)
  end
  return jobs, head
end

local bucket, jobs, head, turns = first_bucket(), {}, nil, 0
while bucket and turns < MOST_TURNS do
  jobs, head = fill(bucket)
  if #jobs > 0 then break end
  bucket, turns = first_bucket(), turns + 1
end
if #jobs == 0 and bucket then return {int(now_us()), '0', {}} end
if not bucket then
  local wakes = {}
  for lane in pairs(lanes) do wakes[#wakes + 1] = P .. 'w:' .. lane end
  redis.call('DEL', unpack(wakes))
  return {int(now_us()), '0', {}}
end

local now, said, ids = now_us(), redis.call('MGET', P .. 'token', P .. 'v'), {}
-- Not a mere counter: a server that lost its data, or a replica that lags, would give out a token a second time.
local token = int(math.max(now, tonumber(said[1] or 0) + 1))
redis.call('MSET', P .. 'token', token, P .. 'v', int(math.max(tonumber(said[2] or 0), head)))
local leases = {}
for i, job in ipairs(jobs) do
  job.attempts = int(job.attempts + 1)
  set(job.id, 'state', 'running', 'token', token, 'worker', worker, 'claimed_us', int(now), 'attempts', job.attempts)
  leases[2 * i - 1], leases[2 * i], ids[i] = int(now + lease_ms * 1000), job.id, job.id
  tell_watchers(job)
end
redis.call('ZADD', P .. 'l', unpack(leases))
redis.call('SET', claim_key, cjson.encode({claim_id = claim_id, token = token, ids = ids}), 'PX', CLAIM_KEPT_MS)
return answer(token, jobs)
