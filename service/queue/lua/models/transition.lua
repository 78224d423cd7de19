-- name, 'state state …' ('none': not registered), entry: from one of these states to the entry → 1, else 0.
local state = model_state(ARGV[1])
for from in string.gmatch(ARGV[2], '%S+') do
  if from == state then
    redis.call('HSET', P .. 'm', ARGV[1], ARGV[3])
    return 1
  end
end
return 0
