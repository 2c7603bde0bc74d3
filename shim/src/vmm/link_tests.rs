//! A VMM that only talks, in order and otherwise.

use std::os::fd::AsFd;

use nacre_proto::vmm::{Event, NewDeviceKind, Resource};

use super::*;

const LIMIT: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(20);

struct Ground {
    link: Link,
    vmm: Packets,
    listening: tokio::task::JoinHandle<()>,
}

fn ground(devices: &[&str]) -> Ground {
    let (link, listener, theirs) = pair(devices).unwrap();
    let listening = tokio::spawn(listener.listen());
    Ground { link, vmm: Packets::new(theirs).unwrap(), listening }
}

impl Ground {
    /// The next request and how many descriptors came with it.
    async fn heard(&self) -> (Request, usize) {
        let mut buffer = vec![0; vmm::MAX_BYTES];
        let received = self.vmm.receive(&mut buffer).await.unwrap();
        (vmm::decode(&buffer[..received.len_bytes]).unwrap(), received.fds.len())
    }

    async fn tell(&self, told: &Told) {
        self.vmm.send(&vmm::encode(told).unwrap(), &[]).await.unwrap();
    }

    async fn event(&self, event: Event) {
        self.tell(&Told::Event(event)).await;
    }

    /// Answers the next request, if it is as expected.
    async fn answer(&self, expected: &Command, outcome: Outcome) {
        let (request, _fds) = self.heard().await;
        assert_eq!(request.command, *expected);
        self.tell(&Told::Reply(Reply { id: request.id, outcome })).await;
    }
}

fn named(device: &str) -> String {
    device.to_owned()
}

#[tokio::test]
async fn answers_reach_who_asked_in_any_order_and_events_who_cares() {
    let ground = ground(&["root"]);
    let link = &ground.link;
    let mut news = link.news("root");
    assert!(link.news("other").changed().await.is_err());
    let answering = async {
        let mut requests = [ground.heard().await.0, ground.heard().await.0];
        requests.sort_by_key(|request| request.command == Command::Stop);
        let [first, second] = requests.map(|request| request.id);
        ground.vmm.send(b"nonsense", &[]).await.unwrap();
        ground.event(Event::DeviceLost { device: named("root"), reason: named("hung\nup") }).await;
        let outcome = Outcome::Refused("no".to_owned());
        ground.tell(&Told::Reply(Reply { id: second, outcome })).await;
        ground.tell(&Told::Reply(Reply { id: 999, outcome: Outcome::Done })).await;
        ground.tell(&Told::Reply(Reply { id: first, outcome: Outcome::Done })).await;
    };
    let (first, second, ()) = tokio::join!(
        link.ask(Command::PowerButton, &[], LIMIT),
        link.ask(Command::Stop, &[], LIMIT),
        answering,
    );
    assert_eq!(first.unwrap().outcome, Outcome::Done);
    let second = second.unwrap();
    assert_eq!(second.outcome, Outcome::Refused("no".to_owned()));
    let lost = news.borrow_and_update().lost.clone();
    assert_eq!((lost.number, lost.reason.as_str()), (2, "hung up"));
    assert_eq!(second.number, 3);
    drop(ground.vmm);
    ground.listening.await.unwrap();
    assert!(news.changed().await.is_err());
    assert!(ground.link.ask(Command::Stop, &[], LIMIT).await.is_err());
}

#[tokio::test]
async fn a_mute_vmm_holds_nobody_up_for_longer_than_asked() {
    let ground = ground(&["disk-0"]);
    let mute = ground.link.ask(Command::Status, &[], SHORT).await;
    assert!(
        matches!(mute, Err(VmmError::Control(error)) if error.kind() == io::ErrorKind::TimedOut)
    );
    ground.heard().await;
    let command = Command::RemoveDevice { device: named("disk-0") };
    let (parting, ()) = tokio::join!(
        ground.link.remove_device("disk-0", LIMIT, SHORT),
        ground.answer(&command, Outcome::Done),
    );
    assert_eq!(parting.unwrap(), Parting::Silent);
}

#[tokio::test]
async fn a_device_is_added_with_its_descriptors_and_its_address_is_one() {
    let ground = ground(&[]);
    let device = NewDevice {
        id: named("vfio-0"),
        kind: NewDeviceKind::Vfio { address: "0000:01:00.0".to_owned() },
    };
    for (address, is_one) in [("0000:00:05.0", true), ("../../etc", false)] {
        let fd = ground.vmm.as_fd();
        let beside = [fd, fd, fd];
        let adding = ground.link.add_device(device.clone(), &beside, LIMIT);
        let answering = async {
            let (request, fds) = ground.heard().await;
            assert_eq!(request.command, Command::AddDevice { device: device.clone() });
            assert_eq!(fds, 3);
            let outcome = Outcome::Added { address: address.to_owned() };
            ground.tell(&Told::Reply(Reply { id: request.id, outcome })).await;
        };
        let (added, ()) = tokio::join!(adding, answering);
        assert_eq!(added.is_ok(), is_one, "{added:?}");
        let is_known = ground.link.news("vfio-0").has_changed().is_ok();
        assert_eq!(is_known, is_one);
    }
}

#[tokio::test]
async fn a_device_that_goes_and_one_that_stays_are_told_apart() {
    let ground = ground(&["disk-0"]);
    let command = Command::RemoveDevice { device: named("disk-0") };
    // What was said of an earlier attempt does not count.
    ground.event(Event::DeviceKept { device: named("disk-0"), reason: named("earlier") }).await;
    let mut news = ground.link.news("disk-0");
    news.wait_for(|news| news.kept.number > 0).await.unwrap();
    let kept = Event::DeviceKept { device: named("disk-0"), reason: named("busy") };
    let removed = Event::DeviceRemoved { device: named("disk-0") };
    for (event, parting) in [(kept, Parting::Kept(named("busy"))), (removed, Parting::Gone)] {
        let answering = async {
            ground.answer(&command, Outcome::Done).await;
            ground.event(event).await;
        };
        let (parted, ()) =
            tokio::join!(ground.link.remove_device("disk-0", LIMIT, LIMIT), answering);
        assert_eq!(parted.unwrap(), parting);
    }
    assert!(news.borrow_and_update().is_removed && news.changed().await.is_err());
    let (refused, ()) = tokio::join!(
        ground.link.remove_device("disk-0", LIMIT, LIMIT),
        ground.answer(&command, Outcome::Refused("no such device".to_owned())),
    );
    assert!(matches!(refused, Err(VmmError::Refused(why)) if why == "no such device"));
}

#[tokio::test]
async fn what_is_told_of_processors_and_memory_is_kept_apart() {
    let ground = ground(&[]);
    let (mut cpus, mut memory) = (ground.link.cpus(), ground.link.memory());
    ground.event(Event::CpusChanged { cpus: 3 }).await;
    ground.event(Event::MemoryChanged { bytes: 5 << 30 }).await;
    let reason = named("not\tnow");
    ground.event(Event::Declined { what: Resource::Memory, reason }).await;
    let told = memory.wait_for(|news| news.declined.number > 0).await.unwrap().clone();
    assert_eq!((told.number, told.now, told.declined.number), (2, 5 << 30, 3));
    assert_eq!(cpus.wait_for(|news| news.number > 0).await.unwrap().now, 3);
    assert_eq!(ground.link.heard(), 3);
}
