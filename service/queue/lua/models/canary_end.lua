-- id, epoch, state ('promoted' | 'rolled_back' | 'stopped'), reason: a running canary ends, once, whoever says so first.
-- A candidate that is promoted becomes the latest version. Nothing is unloaded: what was accepted is drawn.
-- → the state in which the canary is now, or 'missing' if another one has taken its place.
local id, epoch, state, reason = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local said = redis.call('HGET', P .. 'ca', id)
local entry = said and cjson.decode(said)
if not entry or entry.epoch ~= epoch then return 'missing' end
if entry.state ~= 'running' then return entry.state end
if state == 'promoted' then
  if redis.call('HGET', P .. 'ma', id) ~= entry.base or model_state(id .. '/' .. entry.candidate) ~= 'serving' then
    state, reason = 'stopped', 'the versions that are served have changed'
  else
    redis.call('HSET', P .. 'ma', id, entry.candidate)
  end
end
entry.state, entry.reason, entry.ended_us = state, reason, int(now_us())
redis.call('HSET', P .. 'ca', id, cjson.encode(entry))
return state
