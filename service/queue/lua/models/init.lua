-- JSON of {name: entry}, JSON of {id: version}: what is not registered yet is registered now.
for name, entry in pairs(cjson.decode(ARGV[1])) do redis.call('HSETNX', P .. 'm', name, cjson.encode(entry)) end
for id, version in pairs(cjson.decode(ARGV[2])) do redis.call('HSETNX', P .. 'ma', id, version) end
