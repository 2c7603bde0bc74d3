//! A stream of numbered words that the host sends, checked and sent back.

use virtio_drivers::Error;
use virtio_drivers::device::socket::{
    SocketError, VirtIOSocket, VsockAddr, VsockConnectionManager, VsockEventType,
};
use virtio_drivers::transport::DeviceType;
use virtio_drivers::transport::pci::PciTransport;

use super::Watch;
use crate::dma::Identity;
use crate::{pci, say};

const PORT: u32 = 5000;
/// More words than this are not lost or repeated: the stream is out of step.
const FARTHEST: u64 = 1 << 32;

/// Says that nothing comes any more.
const LAST: u64 = u64::MAX;

type Sockets = VsockConnectionManager<Identity, PciTransport>;

/// What has come of the stream.
struct Stream {
    /// The number of the next word.
    next: u64,
    /// The bytes of a word that has not come whole.
    part: [u8; 8],
    part_len: usize,
}

/// Echoes one connection until the host ends it.
pub fn run() {
    let function = pci::find(DeviceType::Socket, 0).expect("a socket device");
    pci::enable(function);
    let driver = VirtIOSocket::new(pci::transport(function)).expect("the driver starts");
    let mut sockets: Sockets = VsockConnectionManager::new(driver);
    sockets.listen(PORT);
    let mut watch = Watch::start();
    let mut stream = Stream { next: 0, part: [0; 8], part_len: 0 };
    let mut buffer = [0; 512];
    loop {
        let event = sockets.wait_for_event().expect("an event");
        match event.event_type {
            VsockEventType::Received { .. } => loop {
                let len = sockets.recv(event.source, PORT, &mut buffer).expect("bytes");
                if len == 0 {
                    break;
                }
                stream.check(&buffer[..len], &mut watch);
                send_all(&mut sockets, event.source, &buffer[..len]);
                sockets.update_credit(event.source, PORT).expect("credit");
                watch.completed();
            },
            VsockEventType::Disconnected { .. } => break,
            _ => {}
        }
    }
    if !watch.is_over() {
        watch.tally.errors += 1;
        say!("the connection ended at word {}", stream.next);
    }
    watch.report();
}

impl Stream {
    fn check(&mut self, bytes: &[u8], watch: &mut Watch) {
        for byte in bytes {
            self.part[self.part_len] = *byte;
            self.part_len += 1;
            if self.part_len == self.part.len() {
                self.part_len = 0;
                self.word(u64::from_le_bytes(self.part), watch);
            }
        }
    }

    fn word(&mut self, word: u64, watch: &mut Watch) {
        if word == LAST {
            return;
        }
        let (missing, again) = (word.wrapping_sub(self.next), self.next.wrapping_sub(word));
        if missing < FARTHEST {
            watch.tally.lost += missing;
        } else {
            assert!(again < FARTHEST, "{word:#x} comes at word {:#x}", self.next);
            watch.tally.repeated += again;
        }
        self.next = word + 1;
    }
}

/// Waits for credit where the host's window is full.
fn send_all(sockets: &mut Sockets, peer: VsockAddr, bytes: &[u8]) {
    while let Err(error) = sockets.send(peer, PORT, bytes) {
        let full = SocketError::InsufficientBufferSpaceInPeer;
        assert_eq!(error, Error::SocketDeviceError(full), "cannot send");
        sockets.poll().expect("a credit update");
    }
}
