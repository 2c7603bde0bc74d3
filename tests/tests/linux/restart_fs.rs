//! The processes of a sandbox's shares die while a container works on its files; it must not notice.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nacre_tests::leftovers::Leftovers;
use nacre_tests::nacre::{Attached, User};
use nacre_tests::process::{Signal, children_of, until};
use rustix::process::kill_process;

const NAME: &str = "shares";
/// How often the processes have to die before it is enough.
const KILLS: usize = 8;

/// Works on a tree, appends to a file that is opened each time and to two that stay open, one of
/// which has no name. Whatever goes wrong ends it.
const WORK: &str = r#"
set -e
cd /data
exec 3>>held 4<>nameless
rm nameless
mkdir work
echo up
n=0
while [ ! -e /data/enough ]; do
    n=$((n + 1))
    echo "line $n" >&3
    echo "line $n" >>opened
    echo "line $n" >&4
    mkdir work/d
    (set -C; echo "data $n" >work/d/new)
    ln work/d/new work/d/link
    mv work/d/new work/d/file
    ln -s file work/d/symlink
    [ "$(cat work/d/symlink)" = "data $n" ]
    mv work/d "work/e$n"
    (set -C; echo "other $n" >work/other)
    mv work/other "work/e$n/link"
    [ "$(cat "work/e$n/link" "work/e$n/file" | tr '\n' ' ')" = "other $n data $n " ]
    [ "$(ls "work/e$n" | tr '\n' ' ')" = "file link symlink " ]
    rm -r "work/e$n"
    [ ! -e "work/e$n" ]
done
rmdir work
for file in held opened "/proc/$$/fd/4"; do
    awk -v n=$n '$0 != "line " NR { print "wrong:", NR, $0; exit 1 }
        END { if (NR != n) { print NR, "lines, not", n; exit 1 } }' <"$file"
done
echo "rounds $n"
"#;

/// Kills a process of a share, another one each time.
fn kill(parent: u32, turn: usize) -> Result<()> {
    let children = children_of(parent)?.into_iter();
    let shares: Vec<_> = children.filter(|(_pid, name)| name == "nacre-fs").collect();
    // One that died a moment ago may have no successor yet.
    if let Some((pid, _name)) = shares.get(turn % shares.len().max(1)) {
        kill_process(*pid, Signal::KILL)?;
    }
    Ok(())
}

fn lines(path: &Path) -> Result<usize> {
    Ok(fs::read_to_string(path)?.lines().count())
}

#[test]
fn a_container_works_on_while_the_processes_of_its_shares_are_killed_again_and_again() -> Result<()>
{
    let (user, folder) = (User::new()?, tempfile::tempdir()?);
    let before = Leftovers::now(user.state())?;
    let volume = format!("{}:/data", folder.path().display());
    let options = ["--name", NAME, "-v", &volume];
    let mut run = Attached::start(&mut user.run_command(&options, &["sh", "-c", WORK])?)?;
    if run.until("up").is_err() {
        bail!("the container does not begin: {:?}", run.wait()?);
    }
    let opened = folder.path().join("opened");
    for turn in 0..KILLS {
        let before = lines(&opened).unwrap_or(0);
        kill(run.process().id(), turn)?;
        // Not a wait for anything: the pauses differ, so that deaths fall anywhere, now and then
        // on a successor that has just begun.
        thread::sleep(Duration::from_millis(turn as u64 * 97 % 300));
        if turn % 4 == 0 {
            kill(run.process().id(), turn)?;
        }
        until("the container works on", || {
            Ok(lines(&opened).is_ok_and(|now| now > before + 1) || !run.process().is_running()?)
        })?;
    }
    fs::write(folder.path().join("enough"), "")?;
    let answer = run.wait()?.code(0)?;
    let rounds = answer.out.lines().find_map(|line| line.strip_prefix("rounds "));
    let rounds: usize = rounds.context("the number of rounds")?.parse()?;
    for file in ["held", "opened"] {
        let here = lines(&folder.path().join(file))?;
        ensure!(here == rounds, "{file} has {here} lines after {rounds} rounds");
    }
    ensure!(!folder.path().join("work").exists() && !folder.path().join("nameless").exists());
    let replaced = answer.said.lines().filter(|line| line.contains("it was replaced")).count();
    ensure!(replaced >= KILLS / 2, "{replaced} processes were replaced: {answer:?}");
    before.and_nothing_more(user.state())
}
