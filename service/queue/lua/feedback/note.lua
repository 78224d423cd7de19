-- id, image, word ('chosen' | 'rejected' | 'rerolled'), digest, entry (JSON), most, most per key, kept_ms: what a client
-- says of an image. A second word about the same image takes the first one's place. Of a prompt that may train (digest is
-- not empty) it is noted in the log, too; one that ranks high comes into it only where it was not liked.
-- → 'ok'; 'same' (it was said before); 'missing', or the state of a job that has no images.
local id, image, word, digest = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local job = load(id)
if not job.state then return 'missing' end
if job.state ~= 'done' then return job.state end
local said = cjson.decode(redis.call('HGET', P .. 'j:' .. id, 'feedback') or '{}')
local before = said[image]
if before == word then return 'same' end
said[image] = word
set(id, 'feedback', cjson.encode(said))
redis.call('HINCRBY', P .. 'n', 'feedback_' .. word, 1)
if before then redis.call('HINCRBY', P .. 'n', 'feedback_' .. before, -1) end
if digest == '' or was_erased(job) then return 'ok' end
local field = job.key .. '|' .. digest
local known = redis.call('HGET', P .. 'fb', field)
if not known and word == 'chosen' then return 'ok' end
local entry = known and cjson.decode(known) or cjson.decode(ARGV[5])
entry[word] = (entry[word] or 0) + 1
if before and entry[before] then entry[before] = math.max(0, entry[before] - 1) end
keep_prompt(job.key, field, entry, known, tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]))
return 'ok'
