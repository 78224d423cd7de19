-- Prepended to every script. KEYS[1] is the prefix of all keys of one queue; its hash tag keeps them in one slot.
--   j:<id>      hash    the job: the truth about it
--   a:<id>      set     the clients that wait for it on an open connection
--   i:<digest>  string  the job that an Idempotency-Key stands for
--   p:<bucket>  zset    waiting jobs of one bucket, by score (below)
--   b           zset    buckets that hold something, by the score of their head
--   o           zset    every waiting job, by score: what comes before a job is one ZCOUNT
--   pending     zset    every waiting job, by the time of its acceptance
--   wl, kc      hash    the cost of what waits, by lane; how many jobs wait, by key and priority
--   l           zset    jobs that a worker holds, by the moment when its lease ends
--   d           zset    jobs that have not ended, by their deadline
--   sc          zset    jobs that are done and whose scores are still to come, by the moment when they count as lost
--   ab          zset    jobs whose last client has gone, by the moment when they are given up
--   v, f        virtual time, and for each key the virtual time at which its last job is over
--   rt          hash    by lane, what its last jobs took (below); and when the last job of any lane was drawn
--   ar          hash    by lane, the work that was accepted of late (it fades), and by <lane>@ when it was noted
--   pt:<key>    hash    after how long clients of a key have left of late (below)
--   st:<key>    zset    event streams that a key has open, by the moment when they count no more
--   q:<key>     hash    what is left of a key's quota
--   k:<key>     zset    a key's newest jobs, by the time of their acceptance
--   w:<lane>    list    wake-up tokens for the workers of a lane
--   c:<worker>  string  the worker's last claim, so that a repeated call gets the same answer
--   wk, wi:<worker>     workers by the moment when they count as gone; what each says about itself
--   wo:<worker>         what an operator wants of a worker, if it is to claim nothing: 'paused' or 'draining'
--   r:<api>     stream  notices for an API process: 'end' of a job that it accepted, 'score' when the scores of one that
--                       is done have come or count as lost, 'look' at one that it watches
--   n           hash    counters: finished, redelivered, fenced, dead
--   m           hash    what is to become of each model, by <id>/<version> (only with FEWSTEP_MODELS)
--   ma          hash    the version of each model that 'latest' means
--   dr          hash    what drift tests know, by model, version, steps, size, scorer and raw or selected
--   sp:<digest> string  a prompt that a drift test has counted lately
--   ca          hash    by model, the canary that runs or the last one: which versions, since when, what became of it
--   cs:<epoch>  hash    sums over the pairs of a canary;  cp:<epoch> hash: pairs of which one half is there
--   fb          hash    prompts that may train, by <key>|<digest>;  fz zset: the same by time;  fc hash: how many, by key
--   fe          hash    keys whose feedback was erased, and when: jobs from before leave none
--   pr          hash    what the golden probes gave on kinds of machine that the bundles say nothing of
--   u:<day>     hash    what was drawn for each key on a day: <key>|jobs, |images, |work
--   secret:<x>  string  random bytes that the processes of a queue share;  turn:<x>  who does a duty now
--   dead        zset    jobs that were given up with their workers, by the moment of it: their records are kept a week
--   wh          zset    jobs whose webhook is still to be sent, by the moment of the next try
-- A bucket is <lane>|<size>|<steps>, with |solo behind it for a job that has been lost with a worker before.
-- All times are the server's, in microseconds: it is the only clock. A cost is in thousands of pixel-steps.
--
-- Which state may follow which is written in states.py, and a test holds these scripts to it.
--
-- Order: start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996). A key's job starts where the key's last one is
-- over, but not before the virtual time, which is the score of the job that was claimed last. So keys take turns by
-- cost, and one that was idle has no claim on the past. Inside a key a higher priority comes first; ahead of other keys
-- it lowers the score by a bounded amount of work, so that everybody's turn comes.
--
-- Keys that jobs need while they live (p, b, o, pending, l, d, ...) empty with their jobs; the reaper keeps them for a
-- week more at each access, so that none can end under a job that waits or runs.
local P = KEYS[1]
local CLAIM_KEPT_MS = 600000
local STREAM_KEPT_MS = 3600000
local WEEK_MS = 604800000
local WEBHOOK_KEPT_MS = 7200000  -- longer than all tries to send one can take
local RECHECK_US = 5000000
local ARRIVALS_US = 30000000
local QUOTA_MS = 60000  -- in which a whole quota comes back
local DEAD_KEPT = 1000
local USAGE_KEPT_MS = 34560000000  -- 400 days
local WINDOW, WINDOWS = 8, 9
local LOWEST, HIGHEST = -5, 5

-- Lua prints large numbers in scientific notation.
local function int(x)
  return string.format('%.0f', x)
end

local clock
local function now_us()
  if not clock then
    local t = redis.call('TIME')
    clock = t[1] * 1000000 + t[2]
  end
  return clock
end

local function keep(key, ms)
  ms = tonumber(ms)
  if redis.call('PTTL', key) < ms then redis.call('PEXPIRE', key, int(ms)) end
end

local function pairs_of(flat)
  local found = {}
  for i = 1, #flat, 2 do found[flat[i]] = flat[i + 1] end
  return found
end

local FIELDS = {
  'state', 'token', 'cancel', 'bucket', 'lane', 'key', 'priority', 'cost', 'charged', 'images', 'score', 'start',
  'attempts', 'worker', 'created_us', 'claimed_us', 'deadline_us', 'ttl_ms', 'reply', 'watchers', 'webhook', 'detached',
  'best', 'advanced', 'since_us', 'scoring', 'expected_ms', 'ahead', 'open_ended', 'pair', 'payload',
}

-- A job's record as a table; state is nil if there is none.
local function load(id)
  local row, job = redis.call('HMGET', P .. 'j:' .. id, unpack(FIELDS)), {id = id}
  for i, name in ipairs(FIELDS) do job[name] = row[i] or nil end
  return job
end

local function set(id, ...)
  redis.call('HSET', P .. 'j:' .. id, ...)
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

local function count_waiting(job, sign)
  redis.call('HINCRBY', P .. 'wl', job.lane, int(sign * job.cost))
  redis.call('HINCRBY', P .. 'kc', job.key .. '|' .. (job.priority or '0'), sign)
end

-- Among the waiting jobs, with the score that it has.
local function push(job, bucket)
  redis.call('ZADD', P .. 'p:' .. bucket, job.score, job.id)
  redis.call('ZADD', P .. 'b', 'LT', job.score, bucket)
  redis.call('ZADD', P .. 'pending', job.created_us, job.id)
  redis.call('ZADD', P .. 'o', job.score, job.id)
  count_waiting(job, 1)
end

-- A waiting job's record has gone, and with it what it counts for: let the reaper count again.
local function miscounted()
  redis.call('DEL', P .. 'o')
end

-- Take jobs of one bucket out of the waiting ones; the index of buckets is the caller's.
local function withdraw(bucket, jobs)
  local ids = {}
  for i, job in ipairs(jobs) do ids[i] = job.id end
  redis.call('ZREM', P .. 'p:' .. bucket, unpack(ids))
  redis.call('ZREM', P .. 'pending', unpack(ids))
  local counted, costs, keys = redis.call('ZREM', P .. 'o', unpack(ids)), {}, {}
  if counted < #jobs then return end  -- an older release has put some there: the reaper will count again
  for _, job in ipairs(jobs) do
    if not job.state then return miscounted() end
    local key = job.key .. '|' .. (job.priority or '0')
    costs[job.lane] = (costs[job.lane] or 0) + job.cost
    keys[key] = (keys[key] or 0) + 1
  end
  for lane, cost in pairs(costs) do redis.call('HINCRBY', P .. 'wl', lane, int(-cost)) end
  for key, count in pairs(keys) do redis.call('HINCRBY', P .. 'kc', key, -count) end
end

local function wake(lane)
  local key = P .. 'w:' .. lane
  local tokens = redis.call('LPUSH', key, 1)
  if tokens == 1 then redis.call('PEXPIRE', key, 60000) end
  if tokens > 64 then redis.call('LTRIM', key, 0, 63) end
end

local function notify(api, id, what)
  local stream = P .. 'r:' .. api
  redis.call('XADD', stream, 'MAXLEN', '~', 10000, '*', 'id', id, 'what', what)
  redis.call('PEXPIRE', stream, STREAM_KEPT_MS)
end

local function tell_watchers(job, but)
  for api in string.gmatch(job.watchers or '', '%S+') do
    if api ~= but then notify(api, job.id, 'look') end
  end
end

local function watch(job, api)
  for known in string.gmatch(job.watchers or '', '%S+') do
    if known == api then return end
  end
  set(job.id, 'watchers', (job.watchers or '') .. api .. ' ')
end

-- What a key was charged for work that it did not get.
local function refund(job, cost)
  if tonumber(job.charged or 0) > 0 and redis.call('EXISTS', P .. 'q:' .. job.key) == 1 then
    redis.call('HINCRBY', P .. 'q:' .. job.key, 'left', int(cost))
  end
end

-- Charge a job's cost once more: what is left of the quota may become a debt.
local function charge(job)
  if not job.charged then return end
  set(job.id, 'charged', int(job.charged + job.cost))
  local key = P .. 'q:' .. job.key
  if redis.call('EXISTS', key) == 1 then
    redis.call('HINCRBY', key, 'left', int(-job.cost))
    redis.call('PEXPIRE', key, int(redis.call('PTTL', key) + QUOTA_MS))
  end
end

-- Its turn for work that it did not get. What it asks for next starts so much earlier; nothing starts before the virtual time.
local function give_turn_back(job)
  local last = redis.call('ZSCORE', P .. 'f', job.key)
  if last then redis.call('ZADD', P .. 'f', int(math.max(0, tonumber(last) - job.cost)), job.key) end
end

-- Sums of a number: how many, of them, of their squares.
local function add_up(key, name, x)
  redis.call('HINCRBY', key, name .. '|n', 1)
  redis.call('HINCRBYFLOAT', key, name .. '|s', string.format('%.17g', x))
  redis.call('HINCRBYFLOAT', key, name .. '|q', string.format('%.17g', x * x))
end

-- Both halves of a pair are there: {side, failed, rewards, call_s, batch}.
local function add_pair(sums, one, other)
  local base, candidate = one, other
  if one.side == 'candidate' then base, candidate = other, one end
  redis.call('HINCRBY', sums, 'pairs', 1)
  if base.failed and candidate.failed then redis.call('HINCRBY', sums, 'both_failed', 1) end
  if base.failed and not candidate.failed then redis.call('HINCRBY', sums, 'base_failed', 1) end
  if candidate.failed and not base.failed then redis.call('HINCRBY', sums, 'candidate_failed', 1) end
  if base.failed or candidate.failed then return end
  for scorer, score in pairs(candidate.rewards) do
    if base.rewards[scorer] then add_up(sums, 'reward:' .. scorer, score - base.rewards[scorer]) end
  end
  if base.batch == candidate.batch and base.call_s > 0 and candidate.call_s > 0 then
    add_up(sums, 'slowdown', math.log(candidate.call_s / base.call_s))
  end
end

-- A half of a canary's pair has ended, as a job ends: once. The second half adds the pair to the sums; if one was given
-- up, the pair counts for nothing.
local function pair_up(job, state, half)
  local model, epoch, pair, side = string.match(job.pair, '^([^|]*)|([^|]*)|([^|]*)|([^|]*)$')
  local entry = model and redis.call('HGET', P .. 'ca', model)
  if not entry or cjson.decode(entry).epoch ~= epoch then return end
  local halves, sums = P .. 'cp:' .. epoch, P .. 'cs:' .. epoch
  local mine_half = half or {}
  mine_half.side, mine_half.failed = side, state == 'failed'
  mine_half.void = (state ~= 'done' and state ~= 'failed') or (state == 'done' and not half)
  local said = redis.call('HGET', halves, pair)
  if not said then
    redis.call('HSET', halves, pair, cjson.encode(mine_half))
  else
    local other_half = cjson.decode(said)
    redis.call('HDEL', halves, pair)
    if mine_half.void or other_half.void then
      redis.call('HINCRBY', sums, 'void', 1)
    else
      add_pair(sums, mine_half, other_half)
    end
  end
  for _, key in ipairs({halves, sums}) do keep(key, 4 * WEEK_MS) end
end

-- Whether a worker that has ended a job still owes its scores.
local function owes_scores(job, token)
  return job.state == 'done' and job.scoring == 'pending' and job.token == token
end

local function owe_scores(id, lease_ms)
  redis.call('ZADD', P .. 'sc', int(now_us() + lease_ms * 1000), id)
  keep(P .. 'sc', WEEK_MS)
end

-- The scores of a job that is done have come, or count as lost.
local function end_scoring(job, scoring, scores)
  set(job.id, 'scoring', scoring, 'scores', scores)
  redis.call('ZREM', P .. 'sc', job.id)
  notify(job.reply, job.id, 'score')
  tell_watchers(job, job.reply)
end

local function lose_scores(job)
  if job.scoring == 'pending' then
    end_scoring(job, 'lost', '')
    if job.pair then pair_up(job, 'done', nil) end
  else
    redis.call('ZREM', P .. 'sc', job.id)
  end
end

-- A job that has pictures of an earlier round ends with them, and says what has kept it from better ones.
local function close(job, state, result, half)
  if state ~= 'done' and job.best then
    set(job.id, 'short', state)
    state, result = 'done', job.best
  end
  set(job.id, 'state', state, 'result', result, 'finished_us', int(now_us()))
  local kept_ms = tonumber(job.ttl_ms)
  if job.webhook then kept_ms = math.max(kept_ms, WEBHOOK_KEPT_MS) end
  redis.call('PEXPIRE', P .. 'j:' .. job.id, int(kept_ms))
  for _, name in ipairs({'l', 'd', 'ab'}) do redis.call('ZREM', P .. name, job.id) end
  redis.call('DEL', P .. 'a:' .. job.id)
  if state == 'failed' then refund(job, job.charged) end
  if job.pair and not (state == 'done' and job.scoring == 'pending') then pair_up(job, state, half) end
  if job.webhook then
    redis.call('ZADD', P .. 'wh', int(now_us()), job.id)
    keep(P .. 'wh', WEEK_MS)
  end
  redis.call('HINCRBY', P .. 'n', 'finished', 1)
  notify(job.reply, job.id, 'end')
  tell_watchers(job, job.reply)
  return state
end

-- Out of everything that a record which is gone may have left behind.
local function forget(id)
  for _, name in ipairs({'l', 'd', 'ab'}) do redis.call('ZREM', P .. name, id) end
  redis.call('DEL', P .. 'a:' .. id)
  if redis.call('ZREM', P .. 'pending', id) == 0 then return end
  miscounted()
  for _, bucket in ipairs(redis.call('ZRANGE', P .. 'b', 0, -1)) do
    if redis.call('ZREM', P .. 'p:' .. bucket, id) == 1 then index(bucket) end
  end
end

-- End a waiting job without a picture.
local function close_waiting(job, why)
  withdraw(job.bucket, {job})
  index(job.bucket)
  if tonumber(job.attempts) == 0 then
    refund(job, job.best and job.cost or job.charged)
    give_turn_back(job)
  end
  return close(job, why, '')
end

-- By what factor a time that was predicted is exceeded by one job in ten, as it was of late: a stochastic approximation
-- of that quantile (Robbins and Monro, 1951), in steps that balance where nine jobs in ten are below it. Never below 1.
-- What is learned shows only in jobs that come later, behind those that were ahead: the more of them, the smaller a step,
-- or the factor swings.
local DELAY_STEP, DELAY_GAIN, LATE_SHARE, MOST_DELAY = 0.05, 0.5, 0.1, 4
local function delay_factor()
  return tonumber(redis.call('HGET', P .. 'rt', 'delay') or 1)
end

-- Of a job that has ended, or (given_up) is given up: then it only shows something if it has taken too long already.
local function learn_delay(job, given_up)
  if not job.expected_ms then return end
  local factor, took_ms = delay_factor(), (now_us() - tonumber(job.created_us)) / 1000
  local late = took_ms > tonumber(job.expected_ms) * factor
  if given_up and not late then return end
  local step = math.min(DELAY_STEP, DELAY_GAIN / math.max(1, tonumber(job.ahead or 1)))
  factor = factor * math.exp(step * (late and 1 - LATE_SHARE or -LATE_SHARE))
  redis.call('HSET', P .. 'rt', 'delay', string.format('%.4f', math.max(1, math.min(MOST_DELAY, factor))))
end

-- End a job without a picture: one that waits at once, a running one when its worker notices the mark. A running one
-- that no lease stands for ends at once, too: nobody is there to notice. So does one that has pictures of an earlier
-- round: nobody need wait for its worker.
-- → 'missing' or the job's state afterwards. The first reason counts; what has ended stays as it is.
local function give_up(id, why)
  local job = load(id)
  redis.call('ZREM', P .. 'ab', id)
  if not job.state then
    forget(id)
    return 'missing'
  end
  if job.state == 'queued' or job.state == 'running' and not job.cancel then learn_delay(job, true) end
  if job.state == 'queued' then return close_waiting(job, why) end
  if job.state ~= 'running' then
    redis.call('ZREM', P .. 'd', id)
    return job.state
  end
  if not job.cancel then set(id, 'cancel', why) end
  if job.best or not redis.call('ZSCORE', P .. 'l', id) then return close(job, job.cancel or why, '') end
  if why == 'expired' then redis.call('ZADD', P .. 'd', int(now_us() + RECHECK_US), id) end
  return 'running'
end

-- Back to waiting, at its old place. A job that was given up while it ran ends here.
local function requeue(job, attempts, solo)
  if job.cancel then
    set(job.id, 'attempts', attempts)
    return close(job, job.cancel, '')
  end
  local bucket = job.bucket
  if solo and string.sub(bucket, -5) ~= '|solo' then bucket = bucket .. '|solo' end
  redis.call('ZREM', P .. 'l', job.id)
  set(job.id, 'state', 'queued', 'bucket', bucket, 'attempts', attempts)
  push(job, bucket)
  wake(job.lane)
  return 'queued'
end

-- A job that was lost with its worker: it may have been the reason, so from now on it travels alone.
local function bury_or_requeue(job, max_attempts)
  if job.state ~= 'running' then
    redis.call('ZREM', P .. 'l', job.id)
    return
  end
  if job.cancel or tonumber(job.attempts) < max_attempts then
    redis.call('HINCRBY', P .. 'n', 'redelivered', 1)
    return requeue(job, job.attempts, true)
  end
  local message = 'The worker died ' .. job.attempts .. ' times while it drew this.'
  local error = {code = 'worker_lost', message = message}
  if close(job, 'failed', cjson.encode({version = 1, error = error})) == 'done' then return 'done' end
  redis.call('HINCRBY', P .. 'n', 'dead', 1)
  redis.call('ZADD', P .. 'dead', int(now_us()), job.id)
  redis.call('ZREMRANGEBYRANK', P .. 'dead', 0, -1 - DEAD_KEPT)
  redis.call('ZREMRANGEBYSCORE', P .. 'dead', '-inf', int(now_us() - WEEK_MS * 1000))
  for _, kept in ipairs({'dead', 'j:' .. job.id}) do keep(P .. kept, WEEK_MS) end
end

local function due(name, limit)
  return redis.call('ZRANGEBYSCORE', P .. name, '-inf', int(now_us()), 'LIMIT', 0, limit)
end

-- → the number of jobs whose lease had run out.
local function reap(limit, max_attempts)
  for _, id in ipairs(due('d', limit)) do give_up(id, 'expired') end
  for _, id in ipairs(due('ab', limit)) do give_up(id, 'cancelled') end
  for _, id in ipairs(due('sc', limit)) do lose_scores(load(id)) end
  local lost = due('l', limit)
  for _, id in ipairs(lost) do bury_or_requeue(load(id), max_attempts) end
  return #lost
end

-- True if the job is still this worker's: a worker that was taken for dead finds another token.
local function mine(job, token)
  return job.state == 'running' and job.token == token
end

-- What drawing takes, in microseconds a cost; nil while it is unknown. The median of the means of the last windows of
-- jobs (median of means): one call that took a thousand times as long moves it by no more than one rank.
local function pace_of(text)
  if not text then return nil end
  local lane = cjson.decode(text)
  if #lane.means == 0 then return lane.work > 0 and lane.busy / lane.work or nil end
  table.sort(lane.means)
  return lane.means[math.ceil(#lane.means / 2)]
end

-- Note that a job's work is done. Its time is what passed since any last one was, or since it was claimed: so the times
-- of workers side by side, and of batch mates, add up to time that passed once. A window ends with a batch.
local function drained(job)
  local said = redis.call('HMGET', P .. 'rt', job.lane, 'last_us')
  local lane = said[1] and cjson.decode(said[1]) or {jobs = 0, work = 0, busy = 0, means = {}}
  if lane.jobs >= WINDOW and lane.token ~= job.token then
    table.insert(lane.means, lane.busy / lane.work)
    if #lane.means > WINDOWS then table.remove(lane.means, 1) end
    lane.jobs, lane.work, lane.busy = 0, 0, 0
  end
  lane.jobs, lane.work, lane.token = lane.jobs + 1, lane.work + job.cost, job.token
  lane.busy = lane.busy + math.max(0, now_us() - math.max(tonumber(said[2] or 0), tonumber(job.claimed_us)))
  redis.call('HSET', P .. 'rt', job.lane, cjson.encode(lane), 'last_us', int(now_us()))
end

-- How long clients of a key wait on an open connection where they have not said for how long: the lower quartile of the
-- times after which the last of them left. "left" says how many left, and "stayed" how many others had their answer after
-- as long or longer; both fade by a factor e in PATIENCE_US. It is believed while a good part of those who had to wait
-- that long left: one who closes a page at once says nothing about the others.
local PATIENCE_US, PATIENCE_KEPT_MS, TIMES_KEPT, FEWEST_LEFT, LEFT_SHARE = 60000000, 600000, 20, 5, 0.2
local function patience_of(key)
  local said = redis.call('HMGET', P .. 'pt:' .. key, 'times', 'left', 'stayed', 'at_us')
  if not said[1] then return {times = {}, ms = 0, left = 0, stayed = 0} end
  local fade, times = math.exp((said[4] - now_us()) / PATIENCE_US), cjson.decode(said[1])
  local sorted = {unpack(times)}
  table.sort(sorted)
  return {times = times, ms = sorted[math.ceil(#sorted / 4)], left = said[2] * fade, stayed = said[3] * fade}
end

local function learn_patience(job, left)
  if not job.open_ended or job.detached then return end
  local known, took_ms = patience_of(job.key), math.floor((now_us() - tonumber(job.created_us)) / 1000)
  if left then
    known.left = known.left + 1
    table.insert(known.times, took_ms)
    if #known.times > TIMES_KEPT then table.remove(known.times, 1) end
  elseif #known.times > 0 and took_ms >= known.ms then
    known.stayed = known.stayed + 1
  else
    return
  end
  redis.call('HSET', P .. 'pt:' .. job.key, 'times', cjson.encode(known.times), 'left',
    string.format('%.3f', known.left), 'stayed', string.format('%.3f', known.stayed), 'at_us', int(now_us()))
  redis.call('PEXPIRE', P .. 'pt:' .. job.key, PATIENCE_KEPT_MS)
end

-- By how much a time is longer than clients of a key would wait for it; 0 or less: it is not, or nothing is known.
local function beyond_patience_ms(key, time_ms)
  local known = patience_of(key)
  if known.left < FEWEST_LEFT or known.left < LEFT_SHARE * (known.left + known.stayed) then return 0 end
  return time_ms - known.ms
end

-- Note work that a lane was asked for: what is remembered fades by a factor e in ARRIVALS_US.
local function arrived(lane, cost)
  local said = redis.call('HMGET', P .. 'ar', lane, lane .. '@')
  local work = said[1] and said[1] * math.exp((said[2] - now_us()) / ARRIVALS_US) or 0
  redis.call('HSET', P .. 'ar', lane, string.format('%.3f', work + cost), lane .. '@', int(now_us()))
end

-- The share of the workers' time that what arrives of late takes: above 1 they cannot keep up. 0 while it is unknown.
local function utilisation()
  local paces, share = pairs_of(redis.call('HGETALL', P .. 'rt')), 0
  local asked = pairs_of(redis.call('HGETALL', P .. 'ar'))
  for lane, pace in pairs(paces) do
    local work, at_us = asked[lane], asked[lane .. '@']
    if work and at_us then
      share = share + work * math.exp((at_us - now_us()) / ARRIVALS_US) / ARRIVALS_US * (pace_of(pace) or 0)
    end
  end
  return share
end

-- How long so many of the waiting jobs will take, in milliseconds, each lane at its own pace; 0 while it is unknown.
local function drain_ms(jobs, waiting)
  if jobs == 0 or waiting == 0 then return 0 end
  local paces, total_us = pairs_of(redis.call('HGETALL', P .. 'rt')), 0
  for lane, work in pairs(pairs_of(redis.call('HGETALL', P .. 'wl'))) do
    total_us = total_us + math.max(0, tonumber(work)) * (pace_of(paces[lane]) or 0)
  end
  return total_us * math.min(1, jobs / waiting) / 1000
end

-- Count what was drawn for a key, by day (UTC): each round as it is drawn, the job with its first.
local function count_usage(job)
  local used = P .. 'u:' .. int(math.floor(now_us() / 86400000000))
  redis.call('HINCRBY', used, job.key .. '|jobs', job.best and 0 or 1)
  redis.call('HINCRBY', used, job.key .. '|images', job.images)
  redis.call('HINCRBY', used, job.key .. '|work', job.cost)
  keep(used, USAGE_KEPT_MS)
end

-- The number of waiting jobs that come before a score.
local function ahead_of(score)
  return redis.call('ZCOUNT', P .. 'o', '-inf', '(' .. score)
end

-- Prompts that may train (hash fb, by <key>|<digest>).
local function drop_prompt(field)
  redis.call('HDEL', P .. 'fb', field)
  redis.call('ZREM', P .. 'fz', field)
  redis.call('HINCRBY', P .. 'fc', string.match(field, '^(.*)|[^|]*$'), -1)
end

-- Whether the job is from before its key's feedback was erased.
local function was_erased(job)
  for _, at in ipairs(redis.call('HMGET', P .. 'fe', job.key, '')) do
    if at and tonumber(job.created_us) <= tonumber(at) then return true end
  end
  return false
end

-- Keep an entry; a new one only while its key has room, and the oldest ones of all go where there are too many.
local function keep_prompt(key, field, entry, known, most, most_per_key, kept_ms)
  if not known then
    if tonumber(redis.call('HGET', P .. 'fc', key) or 0) >= most_per_key then return end
    redis.call('HINCRBY', P .. 'fc', key, 1)
  end
  redis.call('HSET', P .. 'fb', field, cjson.encode(entry))
  redis.call('ZADD', P .. 'fz', int(now_us()), field)
  local old = redis.call('ZRANGEBYSCORE', P .. 'fz', '-inf', int(now_us() - kept_ms * 1000), 'LIMIT', 0, 100)
  for _, name in ipairs(old) do drop_prompt(name) end
  local over = redis.call('ZCARD', P .. 'fz') - most
  if over > 0 then
    for _, name in ipairs(redis.call('ZRANGE', P .. 'fz', 0, over - 1)) do drop_prompt(name) end
  end
  for _, name in ipairs({'fb', 'fz', 'fc'}) do keep(P .. name, kept_ms) end
end

-- What is to be counted with a job's end, or with its scores where these come later:
--   drift  list of {key, score, low, by: factors of the detectors, limit, cap}, and seen: the digest of its prompt
--   half   {rewards, call_s, batch}: of a half of a canary's pair (see pair_up)
--   low    {digest, entry, most, most_per_key, kept_ms}: a prompt that may train
local RECENT = 1000
local SEEN_MS = 600000

-- The means are of the newest jobs; the detectors are those of drift.py.
local function note_drift(row, fresh)
  local said = redis.call('HGET', P .. 'dr', row.key)
  local known = said and cjson.decode(said) or {n = 0, mean = 0, low = 0}
  known.n = known.n + 1
  local share = 1 / math.min(known.n, RECENT)
  known.mean = known.mean + share * (row.score - known.mean)
  known.low = known.low + share * (row.low - known.low)
  if row.by and fresh then
    local detectors = known.e or {}
    for i, factor in ipairs(row.by) do detectors[i] = math.min(row.cap, ((detectors[i] or 0) + 1) * factor) end
    known.e, known.limit = detectors, row.limit
  end
  known.at_us = int(now_us())
  redis.call('HSET', P .. 'dr', row.key, cjson.encode(known))
end

local function note_prompt(job, low)
  if was_erased(job) then return end
  local field = job.key .. '|' .. low.digest
  local known = redis.call('HGET', P .. 'fb', field)
  local entry = known and cjson.decode(known) or low.entry
  if known then
    entry.count = entry.count + 1
    entry.percentile = math.min(entry.percentile, low.entry.percentile)
  end
  keep_prompt(job.key, field, entry, known, low.most, low.most_per_key, low.kept_ms)
end

local function count_notes(job, notes)
  if notes.drift then
    local fresh = redis.call('SET', P .. 'sp:' .. notes.seen, 1, 'NX', 'PX', SEEN_MS)
    for _, row in ipairs(notes.drift) do note_drift(row, fresh) end
    keep(P .. 'dr', 4 * WEEK_MS)
  end
  if notes.low then note_prompt(job, notes.low) end
end
