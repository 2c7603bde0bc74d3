//! The network device: the host sends frames, this guest sends them back.

use virtio_drivers::device::net::{TxBuffer, VirtIONet};
use virtio_drivers::transport::DeviceType;
use virtio_drivers::transport::pci::PciTransport;

use crate::dma::Identity;
use crate::{pci, say};

/// The EtherType of this test's frames (IEEE 802 local experimental 1).
const ETHER_TYPE: [u8; 2] = [0x88, 0xb5];

/// Echoes frames with addresses exchanged until one whose payload begins with `stop`.
pub fn echo() {
    let function = pci::find(DeviceType::Network, 0).expect("a network device");
    pci::enable(function);
    let mut nic: VirtIONet<Identity, PciTransport, 16> =
        VirtIONet::new(pci::transport(function), 2048).expect("the driver starts");
    let mac = nic.mac_address();
    say!(
        "mac={:02x}:{:02x}:{:02x}:{:02x}:{:02x}:{:02x}",
        mac[0],
        mac[1],
        mac[2],
        mac[3],
        mac[4],
        mac[5]
    );
    say!("READY");
    let mut echoed = 0;
    loop {
        if !nic.can_recv() {
            core::hint::spin_loop();
            continue;
        }
        let buffer = nic.receive().expect("a frame");
        let frame = buffer.packet().to_vec();
        nic.recycle_rx_buffer(buffer).expect("the buffer goes back");
        if frame.len() < 18 || frame[12..14] != ETHER_TYPE {
            continue;
        }
        if frame[14..].starts_with(b"stop") {
            break;
        }
        let mut answer = frame.clone();
        answer[..6].copy_from_slice(&frame[6..12]);
        answer[6..12].copy_from_slice(&mac);
        nic.send(TxBuffer::from(&answer)).expect("the answer is sent");
        echoed += 1;
    }
    say!("echoed={echoed}");
}
