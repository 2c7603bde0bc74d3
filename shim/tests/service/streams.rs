//! Standard streams through real fifos, files and programs.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use containerd_shim_protos::{
    api::{CloseIORequest, ResizePtyRequest},
    ttrpc::Code,
};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe,
    time::timeout,
};

use crate::containerd::{Bench, PATIENCE, code, exec_request, limit};

fn fifo(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    path
}

/// Reads a fifo to its end.
async fn read(mut fifo: pipe::Receiver) -> String {
    let mut text = String::new();
    timeout(PATIENCE, fifo.read_to_string(&mut text)).await.unwrap().unwrap();
    text
}

fn reader(path: &Path) -> pipe::Receiver {
    pipe::OpenOptions::new().open_receiver(path).unwrap()
}

#[tokio::test]
async fn output_and_errors_come_through_fifos_before_the_end_is_told() {
    let bench = Bench::new().await;
    let (out, err) = (fifo(bench.folder.path(), "out"), fifo(bench.folder.path(), "err"));
    let (out_reader, err_reader) = (reader(&out), reader(&err));
    let mut request = bench.request("pod", &["fail", "on", "purpose"]);
    request.set_stdout(out.display().to_string());
    request.set_stderr(format!("fifo://{}", err.display()));
    bench.task.create(limit(), &request).await.unwrap();
    bench.start("pod", "").await.unwrap();
    assert_eq!(bench.wait("pod", "").await.unwrap().exit_status, 3);
    // All of it is in the pipe by then.
    let mut byte = [0; 64];
    let read_at_once = err_reader.try_read(&mut byte).unwrap();
    assert_eq!(&byte[..read_at_once], b"on purpose\n");
    assert_eq!(read(err_reader).await, "");
    assert_eq!(read(out_reader).await, "");
}

#[tokio::test]
async fn input_stays_open_until_it_is_closed_by_order() {
    let bench = Bench::new().await;
    let (input, out) = (fifo(bench.folder.path(), "in"), fifo(bench.folder.path(), "out"));
    let out_reader = reader(&out);
    let mut request = bench.request("pod", &["cat"]);
    request.set_stdin(input.display().to_string());
    request.set_stdout(out.display().to_string());
    bench.task.create(limit(), &request).await.unwrap();
    // A client that were done already could not say so to a task that it does not know yet.
    assert!(pipe::OpenOptions::new().open_sender(&input).is_err(), "read before the start");
    bench.start("pod", "").await.unwrap();
    for word in ["one ", "two"] {
        // Each writer comes and goes, and input does not end with it.
        let mut writer = pipe::OpenOptions::new().open_sender(&input).unwrap();
        writer.write_all(word.as_bytes()).await.unwrap();
    }
    let ended = timeout(Duration::from_millis(50), bench.wait("pod", "")).await;
    assert!(ended.is_err(), "input ended with its writers");
    let mut close = CloseIORequest::new();
    close.set_id("pod".to_owned());
    close.set_stdin(true);
    bench.task.close_io(limit(), &close).await.unwrap();
    assert_eq!(bench.wait("pod", "").await.unwrap().exit_status, 0);
    assert_eq!(read(out_reader).await, "one two");
}

#[tokio::test]
async fn output_that_nobody_reads_for_a_while_is_not_lost() {
    let bench = Bench::new().await;
    let out = fifo(bench.folder.path(), "out");
    let mut first = reader(&out);
    // More than any pipe holds.
    let mut request = bench.request("pod", &["flood", "4096"]);
    request.set_stdout(out.display().to_string());
    bench.task.create(limit(), &request).await.unwrap();
    bench.start("pod", "").await.unwrap();
    let mut byte = [0];
    timeout(PATIENCE, first.read_exact(&mut byte)).await.unwrap().unwrap();
    // The reader goes, as containerd does when it is restarted, and another one comes.
    drop(first);
    let second = reader(&out);
    assert_eq!(read(second).await.len() + 1, 4096 << 10);
    assert_eq!(bench.wait("pod", "").await.unwrap().exit_status, 0);
}

#[tokio::test]
async fn an_end_is_told_although_nobody_reads_the_output() {
    let bench = Bench::new().await;
    let out = fifo(bench.folder.path(), "out");
    let mut request = bench.request("pod", &["flood", "1056"]);
    // A little more than the pipe holds: the process can end, its output waits.
    request.set_stdout(out.display().to_string());
    bench.task.create(limit(), &request).await.unwrap();
    bench.start("pod", "").await.unwrap();
    let ended = timeout(PATIENCE, bench.wait("pod", "")).await.unwrap();
    assert_eq!(ended.unwrap().exit_status, 0);
}

#[tokio::test]
async fn a_file_is_appended_to() {
    let bench = Bench::new().await;
    let log = bench.folder.path().join("logs/out");
    for id in ["pod", "web"] {
        let mut request = bench.request(id, &["echo", id]);
        request.set_stdout(format!("file://{}", log.display()));
        bench.task.create(limit(), &request).await.unwrap();
        bench.start(id, "").await.unwrap();
        bench.wait(id, "").await.unwrap();
        if id == "pod" {
            bench.delete("web", "").await.unwrap_err();
        }
    }
    assert_eq!(fs::read_to_string(log).unwrap(), "pod\nweb\n");
}

#[tokio::test]
async fn a_program_takes_the_log_and_is_told_whose_it_is() {
    let bench = Bench::new().await;
    let (program, log) = (bench.folder.path().join("log.sh"), bench.folder.path().join("log"));
    let script = "#!/bin/sh\necho \"$CONTAINER_ID $CONTAINER_NAMESPACE $1 $2\" > \"$2\"\n\
                  exec 5>&-\ncat <&3 >> \"$2\"\ncat <&4 >> \"$2\"\necho end >> \"$2\"\n";
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let mut request = bench.request("pod", &["echo", "hello"]);
    let uri = format!("binary://{}?--to={}", program.display(), log.display());
    request.set_stdout(uri.clone());
    request.set_stderr(uri);
    bench.task.create(limit(), &request).await.unwrap();
    bench.start("pod", "").await.unwrap();
    bench.wait("pod", "").await.unwrap();
    let whole = async {
        loop {
            let text = fs::read_to_string(&log).unwrap();
            if text.ends_with("end\n") {
                return text;
            }
            tokio::task::yield_now().await;
        }
    };
    let text = timeout(PATIENCE, whole).await.unwrap();
    assert_eq!(text, format!("pod tests --to {}\nhello\nend\n", log.display()));
}

#[tokio::test]
async fn a_terminal_gets_the_size_that_was_said_before_its_start() {
    let bench = Bench::new().await;
    bench.create("pod", &["sleep"]).await;
    bench.start("pod", "").await.unwrap();
    let out = fifo(bench.folder.path(), "out");
    let out_reader = reader(&out);
    let mut exec = exec_request("pod", "x", &["size"]);
    exec.set_terminal(true);
    exec.set_stdout(out.display().to_string());
    bench.task.exec(limit(), &exec).await.unwrap();
    let mut resize = ResizePtyRequest::new();
    resize.set_id("pod".to_owned());
    resize.set_exec_id("x".to_owned());
    resize.set_width(132);
    resize.set_height(43);
    bench.task.resize_pty(limit(), &resize).await.unwrap();
    bench.start("pod", "x").await.unwrap();
    bench.wait("pod", "x").await.unwrap();
    assert_eq!(read(out_reader).await, "132 43\n");
    resize.exec_id.clear();
    assert_eq!(code(bench.task.resize_pty(limit(), &resize).await), Code::INVALID_ARGUMENT);
}

#[tokio::test]
async fn streams_that_can_not_be_had_leave_nothing_behind() {
    let bench = Bench::new().await;
    bench.create("pod", &["sleep"]).await;
    bench.start("pod", "").await.unwrap();
    let mut request = bench.request("web", &["echo", "x"]);
    request.set_stdout("tcp:///1".to_owned());
    assert_eq!(code(bench.task.create(limit(), &request).await), Code::INVALID_ARGUMENT);
    assert!(bench.guest().was_asked("delete web"));
    bench.create("web", &["echo", "x"]).await;
}
