//! Each device with the kernel's own driver, at work.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nacre_tests::artifacts;
use nacre_tests::nacre::User;

#[test]
fn a_disk_is_written_and_verified_by_fio() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let disk = dir.path().join("disk.img");
    fs::File::create(&disk)?.set_len(64 << 20)?;
    let path = disk.display().to_string();
    let fio = "fio --name=verify --filename=/dev/disk-0 --direct=1 --ioengine=libaio --iodepth=16 \
        --rw=randwrite --bs=4k --size=16M --verify=crc32c --do_verify=1 --minimal >/dev/null && \
        echo host-sees-this | dd of=/dev/disk-0 bs=512 seek=100000 conv=sync,fsync 2>/dev/null";
    let tools = artifacts::tools_root()?.display().to_string();
    let options = ["--rootfs", &tools, "--disk", &path];
    User::new()?.run(&options, &["sh", "-c", fio])?.code(0)?;
    let image = fs::read(&disk)?;
    ensure!(image[100_000 * 512..].starts_with(b"host-sees-this"), "not in the file");
    Ok(())
}

#[test]
fn a_disk_and_a_volume_given_read_only_cannot_be_written() -> Result<()> {
    let (dir, folder) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let disk = dir.path().join("disk.img");
    fs::write(&disk, vec![7; 1 << 20])?;
    let volume = format!("{}:/data:ro", folder.path().display());
    let disk_option = format!("{}:ro", disk.display());
    let script = "dd if=/dev/zero of=/dev/disk-0 bs=512 count=1 oflag=direct 2>/dev/null && exit 1; \
        touch /data/x 2>/dev/null && exit 2; exit 7";
    let options = ["--disk", &disk_option, "-v", &volume];
    User::new()?.run(&options, &["sh", "-c", script])?.code(7)?;
    ensure!(fs::read(&disk)?.iter().all(|byte| *byte == 7), "written all the same");
    ensure!(!folder.path().join("x").exists(), "made all the same");
    Ok(())
}

#[test]
fn a_volume_carries_a_file_tree_both_ways() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for folder in 0..10 {
        fs::create_dir(dir.path().join(format!("in{folder}")))?;
        for file in 0..20 {
            fs::write(
                dir.path().join(format!("in{folder}/f{file}")),
                format!("{folder}/{file}\n"),
            )?;
        }
    }
    let volume = format!("{}:/data", dir.path().display());
    let script = "cd /data && find . -type f | sort | xargs cat | md5sum && mkdir out && \
        cp -r in* out/ && ln -s in3/f1 out/link && mv out/in9 out/moved && rm -r out/in8";
    let answer = User::new()?.run(&["-v", &volume], &["sh", "-c", script])?.code(0)?;
    let here = Command::new("sh")
        .args(["-c", "find . -path ./out -prune -o -type f -print | sort | xargs cat | md5sum"])
        .current_dir(dir.path())
        .output()?;
    ensure!(answer.out.as_bytes() == here.stdout, "{answer:?}");
    let moved = fs::read_to_string(dir.path().join("out/moved/f19"))?;
    ensure!(moved == "9/19\n" && !dir.path().join("out/in8").exists());
    ensure!(fs::read_link(dir.path().join("out/link"))?.to_str() == Some("in3/f1"));
    Ok(())
}

#[test]
fn the_guest_pings_its_gateway() -> Result<()> {
    let script = "ip -4 addr show dev eth0 | grep -q inet && \
        ping -c 3 -W 20 $(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p')";
    let answer = User::new()?.run(&["--net"], &["sh", "-c", script])?.code(0)?;
    ensure!(answer.out.contains("3 packets received"), "{answer:?}");
    Ok(())
}

#[test]
fn a_guest_with_four_processors_and_more_memory_has_them() -> Result<()> {
    let script = "grep -c ^processor /proc/cpuinfo; sed -n 's/^MemTotal: *//p' /proc/meminfo";
    let answer = User::new()?.run(&["--cpus", "4", "--memory", "768M"], &["sh", "-c", script])?;
    let answer = answer.code(0)?;
    let mut lines = answer.out.lines();
    ensure!(lines.next() == Some("4"), "{answer:?}");
    let kib: u64 =
        lines.next().and_then(|line| line.split(' ').next()).context("memory")?.parse()?;
    ensure!((600 << 10..768 << 10).contains(&kib), "{kib} KiB");
    Ok(())
}
