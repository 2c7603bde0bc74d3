//! Clients of every manner.

use tokio::sync::Notify;

use super::*;
use crate::{
    backends::{self, View},
    devices::{self, DeviceError},
    plan::DevicePlan,
    record::tests::record,
    vmm::pair,
};

/// A socket of a supervisor with a disk that has a keeper, and one more device that has none.
fn open(folder: &tempfile::TempDir) -> (ControlSocket, PathBuf, backends::Desk) {
    let view = View {
        condition: Condition::Serving,
        process: record("a").supervisor,
        program: "/nacre-blk".into(),
        restarts: 3,
    };
    let changed = Arc::new(Notify::new());
    let handle = |device| DeviceHandle::new(device, view.clone(), Arc::clone(&changed));
    let (serial, image) = ("disk-0".to_owned(), "/disk.img".into());
    let (disk, desk) = handle(DevicePlan::Disk { serial, path: image, read_only: false });
    let (vsock, _) = handle(DevicePlan::Vsock { cid: 3 });
    let roster = Roster::default();
    roster.add(vsock);
    roster.add(disk);
    let path = folder.path().join("ctl");
    // A VMM that is gone tells nothing.
    let (link, _, _) = pair(&[]).unwrap();
    let socket = ControlSocket::open(path.clone(), roster, link).unwrap();
    (socket, path, desk)
}

async fn connect(path: &Path) -> Packets {
    let kind = SocketType::SEQPACKET;
    let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    Packets::new(socket).unwrap()
}

#[tokio::test]
async fn devices_are_listed_and_replaced_and_the_socket_goes_with_its_owner() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, path, mut desk) = open(&folder);
    let listed = devices::list(&path).await.unwrap();
    let ids: Vec<&str> = listed.iter().map(|device| device.id.as_str()).collect();
    assert_eq!((ids, listed[1].restarts), (vec!["vsock", "disk-0"], 3));
    let keeper = async {
        let order = desk.orders.recv().await.unwrap();
        assert_eq!(order.program.as_deref(), Some(Path::new("/bin/sh")));
        let busy = devices::replace(&path, "disk-0".to_owned(), None).await;
        assert!(matches!(busy, Err(DeviceError::Refused(_))), "{busy:?}");
        order.answer(Ok(Duration::from_millis(12)));
        let order = desk.orders.recv().await.unwrap();
        order.answer(Err(ReplaceError::FellBack("no".to_owned())));
    };
    let client = async {
        let program = Some("/bin/sh".to_owned());
        let first = devices::replace(&path, "disk-0".to_owned(), program).await;
        assert_eq!(first.unwrap(), 12);
        let second = devices::replace(&path, "disk-0".to_owned(), None).await;
        assert!(matches!(second, Err(DeviceError::FellBack(_))), "{second:?}");
    };
    tokio::join!(keeper, client);
    drop(socket);
    assert!(!path.exists());
    assert!(devices::list(&path).await.is_err());
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_with_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    let (_socket, path, _desk) = open(&folder);
    for (device, program, why) in [
        ("disk-9", None, "there is no device `disk-9`"),
        ("vsock", None, "the sandbox is coming to its end"),
        ("disk-0", Some("/no/program"), "/no/program: no such program"),
        ("disk-0", Some("relative"), "relative: not an absolute path"),
    ] {
        let program = program.map(str::to_owned);
        let refused = devices::replace(&path, device.to_owned(), program).await;
        assert_eq!(refused.unwrap_err().to_string(), why);
    }
    let client = connect(&path).await;
    client.send(b"\"fly\"", &[]).await.unwrap();
    let mut buffer = vec![0; vmm::MAX_BYTES];
    let received = client.receive(&mut buffer).await.unwrap();
    let answer = vmm::decode::<Answer>(&buffer[..received.len_bytes]).unwrap();
    assert!(matches!(answer, Answer::Refused(_)), "{answer:?}");
}

#[tokio::test]
async fn clients_that_say_nothing_or_leave_hold_nobody_up_for_long() {
    let folder = tempfile::tempdir().unwrap();
    let (_socket, path, _desk) = open(&folder);
    let mut silent = Vec::new();
    for _ in 0..MOST_CLIENTS {
        silent.push(connect(&path).await);
    }
    drop(connect(&path).await);
    let listed = timeout(PATIENCE * 4, devices::list(&path)).await.unwrap();
    assert_eq!(listed.unwrap().len(), 2);
}
