//! The whole function under a hostile guest, with the control thread's part played in between.

use std::collections::BTreeSet;

use proptest::{collection::vec, prelude::*};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::interrupt::{Gsi, Irqchip, MsiRoute, MsiRouter};
use crate::virtio::features::VERSION_1;

const QUEUES: usize = 3;

/// Refuses what KVM refuses: a second eventfd at one address, an eventfd bound twice, a line
/// without a route, and some messages.
#[derive(Default)]
struct Strict {
    routes: Mutex<Vec<MsiRoute>>,
    bound: Mutex<usize>,
    doorbells: Mutex<BTreeSet<u64>>,
}

impl Irqchip for Strict {
    fn set_routes(&self, routes: &[MsiRoute]) -> io::Result<()> {
        if routes.iter().any(|route| route.message.data & 0xff == 0x66) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        *self.routes.lock().unwrap() = routes.to_vec();
        Ok(())
    }

    fn bind(&self, _event: &EventFd, gsi: Gsi) -> io::Result<()> {
        let routed = self.routes.lock().unwrap().iter().any(|route| route.gsi == gsi);
        assert!(routed, "line {gsi:?} is bound before it is routed");
        *self.bound.lock().unwrap() += 1;
        Ok(())
    }

    fn unbind(&self, _event: &EventFd, gsi: Gsi) -> io::Result<()> {
        let routed = self.routes.lock().unwrap().iter().any(|route| route.gsi == gsi);
        assert!(routed, "the route of line {gsi:?} went before its binding");
        *self.bound.lock().unwrap() -= 1;
        Ok(())
    }
}

impl Doorbells for Strict {
    fn ring_at(&self, address: u64, _kick: &EventFd) -> io::Result<()> {
        assert!(self.doorbells.lock().unwrap().insert(address), "{address:#x} is taken");
        Ok(())
    }

    fn silence(&self, address: u64, _kick: &EventFd) -> io::Result<()> {
        assert!(self.doorbells.lock().unwrap().remove(&address), "{address:#x} is free");
        Ok(())
    }
}

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

fn function(host: &Arc<Strict>) -> VirtioFunction {
    let router = Arc::new(MsiRouter::new(Arc::clone(host) as Arc<dyn Irqchip>));
    let config_event = event();
    let mut events: Vec<EventFd> = (0..QUEUES).map(|_| event()).collect();
    events.push(config_event.try_clone().unwrap());
    VirtioFunction::new(Parts {
        name: "test".to_owned(),
        kind: DeviceKind(2),
        registers: PciRegisters::new(VERSION_1 | 3, &[64; QUEUES], vec![0; 20], true),
        config_len_bytes: 20,
        vectors: Vectors::new("test", router, events),
        kicks: (0..QUEUES).map(|_| event()).collect(),
        config_event,
        wake: event(),
        doorbells: Arc::clone(host) as Arc<dyn Doorbells>,
    })
}

/// What happens to a function, most of it good enough to get somewhere.
#[derive(Clone, Debug)]
enum Step {
    Config(u16, Vec<u8>),
    Bar(u64, Vec<u8>),
    Map(bool),
    Control,
    Lose,
}

fn step() -> impl Strategy<Value = Step> {
    let word = || prop_oneof![vec(any::<u8>(), 1..=8), (0_u8..4).prop_map(|b| vec![b, 0, 0, 0])];
    let status = prop_oneof![Just(0_u8), Just(3), Just(11), Just(15), any::<u8>()];
    prop_oneof![
        2 => (0_u16..64, prop_oneof![Just(1), Just(2), Just(4)], any::<u32>()).prop_map(
            |(word, len, value)| Step::Config(4 * word, value.to_le_bytes()[..len].to_vec())
        ),
        4 => (0_u64..0x40, word()).prop_map(|(at, data)| Step::Bar(at, data)),
        3 => status.prop_map(|status| Step::Bar(0x14, vec![status])),
        4 => (0_u64..80, word()).prop_map(|(at, data)| Step::Bar(0x4000 + at, data)),
        4 => (0_u64..0x1_0000, word()).prop_map(|(at, data)| Step::Bar(at, data)),
        1 => any::<bool>().prop_map(Step::Map),
        2 => Just(Step::Control),
        1 => Just(Step::Lose),
    ]
}

proptest! {
    #[test]
    fn no_guest_breaks_the_function_or_the_order_of_its_wiring(
        steps in vec(step(), 1..300),
    ) {
        let host = Arc::<Strict>::default();
        let function = function(&host);
        // VERSION_1, so that drivers get as far as DRIVER_OK, and MSI-X.
        function.write_bar(BarIndex::ZERO, 8, &[1, 0, 0, 0]);
        function.write_bar(BarIndex::ZERO, 0xc, &[1, 0, 0, 0]);
        let _no_bar = function.write_config(0x42, &[0, 0x80]);
        for step in steps {
            match step {
                Step::Config(offset, data) => {
                    let _ignored_here = function.write_config(offset, &data);
                    function.read_config(offset, &mut data.clone());
                }
                Step::Bar(offset, data) => {
                    let len = data.len().min(usize::try_from(0x1_0000 - offset).unwrap());
                    function.write_bar(BarIndex::ZERO, offset, &data[..len]);
                    function.read_bar(BarIndex::ZERO, offset, &mut data.clone()[..len]);
                }
                Step::Map(on) => {
                    let range = on.then_some(AddressRange { start: 0x1000, len_bytes: 0x1_0000 });
                    function.bar_mapped(BarIndex::ZERO, range);
                    let doorbells = host.doorbells.lock().unwrap().len();
                    prop_assert_eq!(doorbells, if on { QUEUES } else { 0 });
                }
                Step::Control => {
                    let work = function.take_work();
                    prop_assert!(work.config_writes.len() <= MAX_CONFIG_WRITES);
                    match work.request {
                        Request::Reset => function.finish_reset(),
                        Request::Start(activation) => {
                            prop_assert_eq!(activation.queues.len(), QUEUES);
                        }
                        Request::Nothing => {}
                    }
                    prop_assert_eq!(function.take_work().config_writes, []);
                }
                Step::Lose => function.needs_reset(),
            }
            prop_assert!(*host.bound.lock().unwrap() <= QUEUES + 1);
        }
        drop(function);
        prop_assert_eq!(*host.bound.lock().unwrap(), 0);
        prop_assert!(host.doorbells.lock().unwrap().is_empty());
        prop_assert!(host.routes.lock().unwrap().is_empty());
    }
}

#[test]
fn a_reset_of_a_device_that_never_ran_needs_no_control_thread() {
    let function = function(&Arc::default());
    function.write_bar(BarIndex::ZERO, 0x14, &[3]);
    function.write_bar(BarIndex::ZERO, 0x14, &[0]);
    let mut status = [0xff];
    function.read_bar(BarIndex::ZERO, 0x14, &mut status);
    assert_eq!(status, [0]);
    assert_eq!(function.take_work().request, Request::Nothing);
}

#[test]
fn a_guest_that_floods_the_configuration_is_held_back() {
    let function = function(&Arc::default());
    for _ in 0..1000 {
        function.write_bar(BarIndex::ZERO, 0x2000, &[1]);
    }
    assert_eq!(function.take_work().config_writes.len(), MAX_CONFIG_WRITES);
}
