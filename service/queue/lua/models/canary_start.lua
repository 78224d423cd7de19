-- id, version, entry (JSON: epoch, candidate, share, plan): the version is compared with the promoted one from now on
-- → 'ok', or what stands against it: 'missing' (it is not served), 'latest' (it is the promoted one), 'running' (another
-- canary of the model does).
local id, version, entry = ARGV[1], ARGV[2], cjson.decode(ARGV[3])
local base = redis.call('HGET', P .. 'ma', id)
if model_state(id .. '/' .. version) ~= 'serving' or not base then return 'missing' end
if base == version then return 'latest' end
local said = redis.call('HGET', P .. 'ca', id)
if said and cjson.decode(said).state == 'running' then return 'running' end
entry.base, entry.state, entry.reason, entry.started_us = base, 'running', '', int(now_us())
redis.call('HSET', P .. 'ca', id, cjson.encode(entry))
return 'ok'
