//! Numbered frames that the host sends back, a few on their way at a time. Nothing on the way
//! changes their order.

use virtio_drivers::device::net::{TxBuffer, VirtIONet};
use virtio_drivers::transport::DeviceType;
use virtio_drivers::transport::pci::PciTransport;

use super::{Watch, now};
use crate::dma::Identity;
use crate::pci;

/// IEEE 802 local experimental 1.
const ETHER_TYPE: [u8; 2] = [0x88, 0xb5];
const HOST_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 1];
const WINDOW: u64 = 8;
/// After so many cycles without an answer, about a millisecond, another frame is sent: those before
/// may be lost.
const PATIENCE: u64 = 2_000_000;
/// How long to wait for what is still on its way at the end.
const LAST_PATIENCE: u64 = 400_000_000;

struct Load {
    nic: VirtIONet<Identity, PciTransport, 16>,
    watch: Watch,
    /// The number of the next frame.
    next: u64,
    /// The number of the answer that comes next if nothing is lost.
    expected: u64,
    sent_at: u64,
}

/// Goes on until the host has enough.
pub fn run() {
    let function = pci::find(DeviceType::Network, 0).expect("a network device");
    pci::enable(function);
    let nic = VirtIONet::new(pci::transport(function), 2048).expect("the driver starts");
    let mut load = Load { nic, watch: Watch::start(), next: 0, expected: 0, sent_at: 0 };
    while !load.watch.is_over() {
        if load.next - load.expected < WINDOW || now().wrapping_sub(load.sent_at) > PATIENCE {
            load.send();
        }
        load.receive();
    }
    let end = now();
    while load.expected < load.next && now().wrapping_sub(end) < LAST_PATIENCE {
        load.receive();
    }
    load.watch.tally.lost += load.next - load.expected;
    load.watch.report();
}

fn payload(number: u64) -> impl Iterator<Item = u8> {
    let len = 46 + (number as usize * 13) % 1400;
    let filling = (0..).map(move |at: u64| (number.wrapping_mul(31) ^ at) as u8);
    number.to_le_bytes().into_iter().chain(filling).take(len)
}

impl Load {
    fn send(&mut self) {
        let mut frame = [&HOST_MAC[..], &self.nic.mac_address(), &ETHER_TYPE].concat();
        frame.extend(payload(self.next));
        self.nic.send(TxBuffer::from(&frame)).expect("the frame is taken");
        self.next += 1;
        self.sent_at = now();
    }

    fn receive(&mut self) {
        if !self.nic.can_recv() {
            core::hint::spin_loop();
            return;
        }
        let buffer = self.nic.receive().expect("a frame");
        let frame = buffer.packet().to_vec();
        self.nic.recycle_rx_buffer(buffer).expect("the buffer goes back");
        if frame.len() < 22 || frame[12..14] != ETHER_TYPE {
            return;
        }
        let number = u64::from_le_bytes(frame[14..22].try_into().expect("8 bytes"));
        if number >= self.next || !payload(number).eq(frame[14..].iter().copied()) {
            self.watch.tally.errors += 1;
        } else if number < self.expected {
            self.watch.tally.repeated += 1;
        } else {
            self.watch.tally.lost += number - self.expected;
            self.expected = number + 1;
            self.watch.completed();
        }
    }
}
