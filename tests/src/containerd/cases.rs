//! What users ask of a runtime by `ctr`, as command lines that are the same for every runtime.
//!
//! In a line `{id}` is the container's name, `{image}` the image with busybox; what stands before
//! ` |> ` is the command's standard input, `tty` gives it a terminal, and `await STATE` waits until
//! the task is in that state.

/// Something that a runtime is asked for, and what of its answers has to be equal.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// What it shows, as a sentence.
    pub name: &'static str,
    /// The command lines, one after the other.
    pub lines: &'static [&'static str],
    /// What of an output counts.
    pub keep: Keep,
}

/// What of an output counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// All of it.
    All,
    /// The first word of each line: the rest is measured.
    FirstWords,
}

impl Keep {
    /// The part of an output that counts.
    #[must_use]
    pub fn of(self, output: &str) -> String {
        match self {
            Self::All => output.to_owned(),
            Self::FirstWords => {
                let words = output.lines().filter_map(|line| line.split_whitespace().next());
                words.map(|word| format!("{word}\n")).collect()
            }
        }
    }
}

const fn case(name: &'static str, lines: &'static [&'static str]) -> Case {
    Case { name, lines, keep: Keep::All }
}

/// The fewest that tell whether a runtime works under a containerd at all.
pub const SMOKE: &[Case] = &[
    case(
        "output and exit code",
        &["run --rm {image} {id} sh -c 'echo out; echo err >&2; exit 42'"],
    ),
    case(
        "a container that is added to and killed",
        &[
            "run -d {image} {id} sleep 1000",
            "task exec --exec-id one {id} sh -c 'echo inside; exit 7'",
            "task kill -s SIGKILL {id}",
            "await STOPPED",
            "task delete {id}",
            "container delete {id}",
        ],
    ),
];

/// All of them.
pub const ALL: &[Case] = &[
    SMOKE[0],
    case(
        "standard input",
        &["one\ntwo\n |> run --rm {image} {id} sh -c 'echo begin; cat; echo end'"],
    ),
    case("much output", &["run --rm {image} {id} sh -c 'seq 1 100000; seq 1 100000 | md5sum >&2'"]),
    case(
        "a terminal",
        &["tty run --rm -t {image} {id} \
           sh -c 'until stty size | grep 101; do sleep 0.1; done 2>/dev/null; tty; exit 5'"],
    ),
    case(
        "a program that is not there",
        &["run {image} {id} no-such-program", "container delete {id}"],
    ),
    case(
        "the process as it was asked for",
        &["run --rm --env A=b --cwd /tmp --user 65534:65534 {image} {id} \
           sh -c 'id; pwd; echo $A; ulimit -a; cat /proc/self/oom_score_adj; \
           grep -E \"^(Cap|NoNewPrivs|Groups)\" /proc/self/status'"],
    ),
    case(
        "capabilities, seccomp, paths and the root made read-only",
        &[
            "run --rm --read-only --seccomp --cap-add CAP_SYS_TIME --cap-drop CAP_CHOWN {image} {id} \
           sh -c 'grep -E \"^(Cap|Seccomp:)\" /proc/self/status; touch /x; echo $?; \
           echo 1 >/proc/sys/kernel/panic; echo $?; chown 1 /dev/shm; echo $?; \
           cut -d \" \" -f 5 /proc/self/mountinfo | sort -u; ls -1 /dev; cat /proc/1/cgroup'",
        ],
    ),
    case(
        "a folder of the host's",
        &["run --rm --mount type=bind,src=/etc,dst=/mnt,options=rbind:ro {image} {id} \
           sh -c 'ls /mnt/passwd; touch /mnt/x; echo $?'"],
    ),
    case(
        "a limit of memory",
        &["run --rm --memory-limit 33554432 {image} {id} \
           dd if=/dev/zero of=/dev/shm/x bs=1M count=60"],
    ),
    SMOKE[1],
    case(
        "a signal that the program handles",
        &[
            "run -d {image} {id} sh -c \
             'trap \"echo got it; exit 3\" USR1; touch /ready; while :; do sleep 0.1; done'",
            "task exec --exec-id one {id} sh -c 'until test -e /ready; do sleep 0.1; done'",
            "task kill -s SIGUSR1 {id}",
            "await STOPPED",
            "task delete {id}",
            "task kill {id}",
            "container delete {id}",
        ],
    ),
    case(
        "a pause",
        &[
            "run -d {image} {id} sleep 1000",
            "task pause {id}",
            "await PAUSED",
            "task resume {id}",
            "await RUNNING",
            "task exec --exec-id one {id} echo awake",
            "input |> task exec --exec-id two {id} sh -c 'echo begin; cat'",
            "task exec --exec-id one --cwd /tmp --user 1:1 {id} sh -c 'pwd; id'",
            "task delete {id}",
            "task delete --force {id}",
            "container delete {id}",
        ],
    ),
    Case {
        name: "measurements",
        lines: &[
            "run -d {image} {id} sleep 1000",
            "task metrics {id}",
            "task delete -f {id}",
            "container delete {id}",
        ],
        keep: Keep::FirstWords,
    },
];
