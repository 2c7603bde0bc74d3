//! The socket device: echoes what comes on port 5000 until the peer ends its side.

use virtio_drivers::device::socket::{
    VirtIOSocket, VsockAddr, VsockConnectionManager, VsockEventType,
};
use virtio_drivers::transport::DeviceType;
use virtio_drivers::transport::pci::PciTransport;

use crate::dma::Identity;
use crate::{pci, say};

const PORT: u32 = 5000;

/// Echoes one connection.
pub fn echo() {
    let function = pci::find(DeviceType::Socket, 0).expect("a socket device");
    pci::enable(function);
    let driver: VirtIOSocket<Identity, PciTransport> =
        VirtIOSocket::new(pci::transport(function)).expect("the driver starts");
    let mut sockets = VsockConnectionManager::new(driver);
    sockets.listen(PORT);
    say!("cid={}", sockets.guest_cid());
    say!("READY");
    let mut echoed = 0_usize;
    let mut buffer = [0; 512];
    loop {
        let event = sockets.wait_for_event().expect("an event");
        let peer = event.source;
        match event.event_type {
            VsockEventType::Received { .. } => loop {
                let len = sockets.recv(peer, PORT, &mut buffer).expect("bytes");
                if len == 0 {
                    break;
                }
                send_all(&mut sockets, peer, &buffer[..len]);
                sockets.update_credit(peer, PORT).expect("credit");
                echoed += len;
            },
            VsockEventType::Disconnected { .. } => break,
            _ => {}
        }
    }
    say!("echoed={echoed}");
}

type Sockets = VsockConnectionManager<Identity, PciTransport>;

/// Waits for credit where the host's window is full.
fn send_all(sockets: &mut Sockets, peer: VsockAddr, bytes: &[u8]) {
    while let Err(error) = sockets.send(peer, PORT, bytes) {
        let full = virtio_drivers::device::socket::SocketError::InsufficientBufferSpaceInPeer;
        assert_eq!(error, virtio_drivers::Error::SocketDeviceError(full), "cannot send");
        sockets.poll().expect("a credit update");
    }
}
