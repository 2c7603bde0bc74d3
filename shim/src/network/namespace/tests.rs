//! What is found in a namespace, and frames through a tap of one.

use std::{
    io::{Read, Write},
    net::UdpSocket,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use super::*;

const DEADLINE: Duration = Duration::from_secs(20);

fn route(destination: &str, gateway: &str) -> Route {
    Route {
        destination: destination.to_owned(),
        gateway: gateway.to_owned(),
        interface: "eth0".to_owned(),
        ..Route::default()
    }
}

#[test]
fn interfaces_with_addresses_and_routes_that_do_not_come_with_them_are_found() {
    let links = r#"[
      {"ifname":"lo","link_type":"loopback","address":"00:00:00:00:00:00","mtu":65536,
       "addr_info":[{"family":"inet","local":"127.0.0.1","prefixlen":8,"scope":"host"}]},
      {"ifname":"tunl0","link_type":"ipip","mtu":1480,"addr_info":[]},
      {"ifname":"eth0","link_type":"ether","address":"0a:58:0a:01:00:05","mtu":1450,
       "addr_info":[{"family":"inet","local":"10.1.0.5","prefixlen":24,"scope":"global"},
                    {"family":"inet6","local":"fd00::5","prefixlen":64,"scope":"global"},
                    {"family":"inet6","local":"fe80::1","prefixlen":64,"scope":"link"}]},
      {"ifname":"eth1","link_type":"ether","address":"0a:58:0a:01:00:06","mtu":1500,
       "addr_info":[{"family":"inet6","local":"fe80::2","prefixlen":64,"scope":"link"}]}]"#;
    let four = r#"[{"dst":"default","gateway":"169.254.1.1","dev":"eth0","flags":[]},
      {"dst":"10.1.0.0/24","dev":"eth0","protocol":"kernel","scope":"link"},
      {"dst":"10.9.0.0/16","gateway":"10.1.0.1","dev":"eth0"},
      {"dst":"10.8.0.0/16","gateway":"10.1.0.1","dev":"eth1"},
      {"type":"blackhole","dst":"10.7.0.0/16"},
      {"dst":"169.254.1.1","dev":"eth0","scope":"link"}]"#;
    let six = r#"[{"dst":"fd00::/64","dev":"eth0","protocol":"kernel"},
      {"dst":"default","gateway":"fd00::1","dev":"eth0"}]"#;
    let near = r#"[{"dst":"169.254.1.1","dev":"eth0","lladdr":"ee:ee:ee:ee:ee:ee"}]"#;
    let found = read::found(links, &[four.to_owned(), six.to_owned()], near).unwrap();
    let [interface] = &found.interfaces[..] else { panic!("{found:?}") };
    assert_eq!((interface.name.as_str(), interface.mtu), ("eth0", 1450));
    assert_eq!(interface.mac, "0a:58:0a:01:00:05");
    assert_eq!(interface.addresses, ["10.1.0.5/24", "fd00::5/64"]);
    let routes = [
        route("169.254.1.1/32", ""),
        route("10.9.0.0/16", "10.1.0.1"),
        route("", "169.254.1.1"),
        route("", "fd00::1"),
    ];
    assert_eq!(found.routes, routes);
    assert_eq!(found.neighbors.len(), 1);
    assert_eq!(found.neighbors[0].mac, "ee:ee:ee:ee:ee:ee");
}

#[test]
fn what_is_no_answer_of_ip_is_an_error_and_nothing_is_an_empty_namespace() {
    assert!(read::found("{}", &[String::new(), String::new()], "").is_err());
    assert!(read::found("[]", &["[1]".to_owned(), String::new()], "").is_err());
    assert_eq!(read::found("", &[String::new(), String::new()], "").unwrap(), Found::default());
}

#[test]
fn a_tap_has_a_name_that_the_kernel_takes() {
    assert_eq!(tap_name("eth0"), "eth0.vm");
    assert!(tap_name("a-long-name-it-is").len() <= 15);
}

/// A process in a network namespace of its own.
pub(super) struct Place(Child);

impl Place {
    pub(super) fn new() -> Self {
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-c", "echo ready; exec sleep 1000"]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut word = [0; 6];
        child.stdout.as_mut().unwrap().read_exact(&mut word).unwrap();
        Self(child)
    }

    fn path(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.0.id()).into()
    }

    pub(super) fn namespace(&self) -> Namespace {
        Namespace::open(&self.path()).unwrap()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

pub(super) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The next frame that `wanted` holds for, without its virtio-net header.
fn receive(tap: &mut File, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let deadline = Instant::now() + DEADLINE;
    let mut bytes = [0; 2048];
    loop {
        match tap.read(&mut bytes) {
            Ok(count) if wanted(&bytes[10..count]) => return bytes[10..count].to_vec(),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                thread::sleep(Duration::from_millis(2));
            }
            Err(error) => panic!("{error}"),
        }
        assert!(Instant::now() < deadline, "no such frame");
    }
}

/// A guest would answer the frames; this test does.
#[test]
fn frames_go_between_a_tap_and_what_the_interface_is_connected_to() {
    if !is_root() {
        println!("SKIPPED: only root can make network namespaces");
        return;
    }
    let (pod, peer) = (Place::new(), Place::new());
    let (here, there) = (pod.namespace(), peer.namespace());
    let other = format!("{}", peer.0.id());
    here.run(&[
        "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "far0", "netns", &other,
    ])
    .unwrap();
    here.run(&["ip", "address", "add", "10.77.0.2/24", "dev", "eth0"]).unwrap();
    here.run(&["ip", "link", "set", "dev", "eth0", "mtu", "1400", "up"]).unwrap();
    there.run(&["ip", "address", "add", "10.77.0.1/24", "dev", "far0"]).unwrap();
    there.run(&["ip", "link", "set", "dev", "far0", "up"]).unwrap();
    here.run(&["ip", "route", "add", "default", "via", "10.77.0.1"]).unwrap();

    let found = here.look().unwrap();
    assert_eq!(found.interfaces.len(), 1, "{found:?}");
    assert_eq!(found.interfaces[0].addresses, ["10.77.0.2/24"]);
    assert_eq!(found.interfaces[0].mtu, 1400);
    assert_eq!(found.routes, [route("", "10.77.0.1")]);
    let mut tap = File::from(here.connect(&found.interfaces[0]).unwrap());

    // The peer asks who has the address: the namespace itself does not answer any more.
    let asked = there.inside(|| UdpSocket::bind("10.77.0.1:0")?.send_to(b"hello", "10.77.0.2:9"));
    asked.unwrap();
    let is_question =
        |frame: &[u8]| frame.len() >= 42 && frame[12..14] == [8, 6] && frame[20..22] == [0, 1];
    let question = receive(&mut tap, is_question);
    assert_eq!(question[38..42], [10, 77, 0, 2], "it asks for the interface's address");
    let mac = [2, 0, 0, 0, 0, 9];
    let mut answer = vec![0; 10];
    answer.extend(&question[6..12]);
    answer.extend(mac);
    answer.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
    answer.extend(mac);
    answer.extend(&question[38..42]);
    answer.extend(&question[22..32]);
    tap.write_all(&answer).unwrap();
    let deadline = Instant::now() + DEADLINE;
    while !there.ask(&["ip", "neigh", "show"]).unwrap().contains("02:00:00:00:00:09") {
        assert!(Instant::now() < deadline, "the answer does not arrive");
        tap.write_all(&answer).unwrap();
        thread::sleep(Duration::from_millis(5));
    }
    // A second time is no error, and afterwards the namespace answers again.
    drop(tap);
    drop(here.connect(&found.interfaces[0]).unwrap());
    here.disconnect("eth0").unwrap();
    assert!(here.disconnect("eth0").is_err(), "there is nothing more");
}

#[test]
fn what_is_no_network_namespace_is_an_error() {
    let missing = Namespace::open(Path::new("/nowhere/at/all")).unwrap_err();
    assert!(matches!(missing, NamespaceError::Open(..)));
    if is_root() {
        let other = Namespace::open(Path::new("/proc/self/ns/uts")).unwrap();
        assert!(other.look().is_err());
        let entered = other.inside(|| Ok(())).unwrap_err();
        assert!(matches!(entered, NamespaceError::Enter(..)), "{entered:?}");
    }
}
