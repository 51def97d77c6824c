package proxy

import "strings"

// row is an action of the docker command.
type row struct {
	name  string
	stdin string
	args  []string
	want  string   // must be in the output; the rest is compared with the direct way
	undo  []string // makes room for the action to be done again
}

func list(s string) []string { return strings.Fields(s) }

// rows are actions on containers idle and talker.
func rows(big, sum string, span []string) []row {
	return append(firstRows(big, sum, span), moreRows()...)
}

func firstRows(big, sum string, span []string) []row {
	return []row{
		{"version", "", []string{"version", "-f", "{{.Server.Version}}"}, ".", nil},
		{"ps", "", []string{"ps", "-a", "--no-trunc", "--format", "{{.ID}} {{.Names}}"}, "idle", nil},
		{"images", "", []string{"images"}, "busybox", nil},
		{"inspect", "", []string{"inspect", "idle", "talker"}, "NetworkSettings", nil},
		{"inspect nothing", "", []string{"inspect", "nobody"}, "No such object", nil},
		{"run, piped", "a\nb\n", []string{"run", "--rm", "-i", "busybox", "cat"}, "a\nb\n", nil},
		{"run, much in", big, []string{"run", "--rm", "-i", "busybox", "sha256sum"}, sum, nil},
		{"run, much out", big, []string{"run", "--rm", "-i", "busybox", "cat"}, big, nil},
		{"run, exit code", "", []string{"run", "--rm", "busybox", "sh", "-c", "echo out; echo err >&2; exit 7"}, "out", nil},
		{"run, no image", "", []string{"run", "--rm", "--pull", "never", "nosuchimage"}, "No such image: nosuchimage", nil},
		{"exec, piped", "x\n", []string{"exec", "-i", "idle", "sh", "-c", "cat; exit 3"}, "x", nil},
		{"exec, much", big, []string{"exec", "-i", "idle", "sha256sum"}, sum, nil},
		{"exec, detached", "", []string{"exec", "-d", "idle", "true"}, "", nil},
		{"exec in nothing", "", []string{"exec", "nobody", "true"}, "nobody", nil},
		{"logs", "", []string{"logs", "talker"}, "line 3", nil},
		{"logs -f", "", []string{"logs", "-f", "talker"}, "err 3", nil},
		{"events", "", append([]string{"events"}, span...), "container start", nil},
		{"cp out", "", []string{"cp", "idle:/etc/passwd", "-"}, "root:x:0", nil},
		{"save", "", []string{"save", "busybox"}, "manifest.json", nil},
		{"top", "", []string{"top", "idle", "-o", "pid,args"}, "sleep 600", nil},
		{"diff", "", []string{"diff", "talker"}, "", nil},
		{"build", "FROM busybox\nRUN echo built > /built\nCMD cat /built\n", []string{"build", "-q", "--no-cache", "-t", "made", "-"}, "sha256:", nil},
		{"run what was built", "", []string{"run", "--rm", "made"}, "built", nil},
		{"network ls", "", []string{"network", "ls"}, "bridge", nil},
	}
}

func moreRows() []row {
	return []row{
		{"info", "", list("info -f {{.ServerVersion}}|{{.Driver}}"), ".", nil},
		{"ps filtered", "", list("ps -q --no-trunc -f name=idle"), "", nil},
		{"ps json", "", list("ps -a --format json -f name=talker --no-trunc"), "talker", nil},
		{"port", "", list("port idle"), "", nil},
		{"stats", "", list("stats --no-stream --format {{.Name}} idle"), "idle", nil},
		{"wait", "", list("wait talker"), "0", nil},
		{"inspect size", "", list("inspect -s -f {{.SizeRootFs}} talker"), "", nil},
		{"inspect type", "", list("inspect --type network -f {{.Name}} bridge"), "bridge", nil},
		{"image inspect", "", list("image inspect busybox"), "RootFS", nil},
		{"history", "", list("history --no-trunc busybox"), "IMAGE", nil},
		{"tag and untag", "", list("tag busybox tagged:1"), "", list("rmi tagged:1")},
		{"rmi nothing", "", list("rmi nosuch"), "No such image", nil},
		{"commit", "", list("commit -m words talker committed"), "sha256:", list("rmi committed")},
		{"rename", "", list("rename talker renamed"), "", list("rename renamed talker")},
		{"rename to a taken name", "", list("rename talker idle"), "in use", nil},
		{"pause", "", list("pause idle"), "idle", list("unpause idle")},
		{"unpause what runs", "", list("unpause idle"), "not paused", nil},
		{"update", "", list("update --restart no idle"), "idle", nil},
		{"restart", "", list("restart -t 0 talker"), "talker", list("wait talker")},
		{"stop", "", list("stop -t 0 idle"), "idle", list("start idle")},
		{"kill", "", list("kill idle"), "idle", list("start idle")},
		{"kill by a wrong signal", "", list("kill -s NOSIG idle"), "NOSIG", nil},
		{"start, attached", "", list("start -a talker"), "line 1", nil},
		{"start nothing", "", list("start nobody"), "nobody", nil},
		{"stop nothing", "", list("stop nobody"), "nobody", nil},
		{"attach to what ended", "", list("attach talker"), "stopped container", nil},
		{"logs, tail", "", list("logs --tail 1 talker"), "", nil},
		{"logs, times", "", list("logs -t talker"), "T", nil},
		{"logs of nothing", "", list("logs nobody"), "nobody", nil},
		{"exec, folder", "", list("exec -w /etc idle pwd"), "/etc", nil},
		{"exec, variable", "", list("exec -e A=b idle printenv A"), "b", nil},
		{"exec, user", "", list("exec -u 7 idle id -u"), "7", nil},
		{"exec, no such program", "", list("exec idle nosuch"), "nosuch", nil},
		{"run, no such program", "", list("run --rm busybox nosuch"), "nosuch", nil},
		{"run, volume", "", list("run --rm -v /vol busybox ls -d /vol"), "/vol", nil},
		{"run, read only", "", list("run --rm --read-only busybox touch /x"), "Read-only", nil},
		{"run, entry point", "", list("run --rm --entrypoint echo busybox hi"), "hi", nil},
		{"run, host name", "", list("run --rm -h box busybox hostname"), "box", nil},
		{"run, no network", "", list("run --rm --net none busybox ls /sys/class/net"), "lo", nil},
		{"run, network of another", "", list("run --rm --net container:idle busybox ls /sys/class/net"), "eth0", nil},
		{"run, nowhere", "", list("run --rm --net nowhere busybox true"), "nowhere", nil},
		{"run, wrong limit", "", list("run --rm -m 1 busybox true"), "memory", nil},
		{"create, name taken", "", list("create --name idle busybox"), "in use", nil},
		{"run, detached", "", list("run -d --name det busybox sleep 60"), "", list("rm -f det")},
		{"run, not attached", "", list("run -a stderr --rm busybox echo x"), "", nil},
		{"rm what runs", "", list("rm idle"), "running", nil},
		{"rm nothing", "", list("rm nobody"), "nobody", nil},
		{"cp from nothing", "", list("cp nobody:/x -"), "nobody", nil},
		{"cp of no file", "", list("cp idle:/nosuch -"), "nosuch", nil},
		{"diff of nothing", "", list("diff nobody"), "nobody", nil},
		{"top of nothing", "", list("top nobody"), "nobody", nil},
		{"volume create", "", list("volume create vol"), "vol", list("volume rm vol")},
		{"volume ls", "", list("volume ls -q"), "", nil},
		{"volume inspect nothing", "", list("volume inspect novol"), "novol", nil},
		{"network create", "", list("network create nw"), "", list("network rm nw")},
		{"network inspect", "", list("network inspect bridge -f {{.IPAM.Driver}}"), "default", nil},
		{"network rm nothing", "", list("network rm nonet"), "nonet", nil},
		{"network disconnect", "", list("network disconnect bridge idle"), "", list("network connect bridge idle")},
		{"node ls", "", list("node ls"), "swarm", nil},
		{"plugin ls", "", list("plugin ls"), "ID", nil},
		{"system df", "", list("system df --format {{.Type}}"), "Images", nil},
		{"image prune", "", list("image prune -f --filter label=nosuch"), "reclaimed", nil},
		{"load nonsense", "no archive", list("load"), "", nil},
		{"import", "", list("import /dev/null"), "", nil},
		{"build, error", "FROM busybox\nRUN exit 9\n", list("build -"), "returned a non-zero code: 9", nil},
		{"build, wrong file", "NONSENSE\n", list("build -"), "NONSENSE", nil},
	}
}
