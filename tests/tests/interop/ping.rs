//! Echo requests without a pause: the guest's kernel answers each that it gets. An answer that comes
//! twice tells of a frame that was carried twice, in either direction.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nacre_tests::process::until;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, recv, sendto,
    socket_with,
};

/// How long to wait from one request to the next.
const PAUSE: Duration = Duration::from_micros(500);
/// An ICMP message (RFC 792): type, code, checksum, identifier, sequence number.
const HEADER_BYTES: usize = 8;
const ECHO_REQUEST: u8 = 8;
/// An IPv4 header without options, which a raw socket gives with each message.
const IP_HEADER_BYTES: usize = 20;
/// In the place of identifier and sequence number, so that no other message is taken for ours.
const MARK: [u8; 4] = *b"nacr";

/// Requests under way, until it is dropped or asked for what came of them.
pub(crate) struct Pings {
    enough: Arc<AtomicBool>,
    /// The number of the next request.
    sent: Arc<AtomicU64>,
    /// One more than the number of the newest request that was answered.
    answered: Arc<AtomicU64>,
    thread: JoinHandle<Result<Vec<u8>>>,
}

/// What came of all requests.
#[derive(Debug)]
pub(crate) struct Tally {
    pub(crate) answered: usize,
    /// Answered more than once.
    pub(crate) repeated: usize,
}

impl Pings {
    /// Begins, in the calling thread's network namespace.
    pub(crate) fn start(to: Ipv4Addr) -> Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::INET, SocketType::RAW, flags, Some(ipproto::ICMP))?;
        let enough = Arc::new(AtomicBool::new(false));
        let (sent, answered) = (Arc::default(), Arc::default());
        let counts = [&sent, &answered].map(Arc::clone);
        let until = Arc::clone(&enough);
        let thread = thread::spawn(move || flood(&socket, to, &counts, &until));
        Ok(Self { enough, sent, answered, thread })
    }

    /// Waits for the answer to a request that was not sent yet.
    pub(crate) fn another(&self) -> Result<()> {
        let next = self.sent.load(Ordering::Relaxed);
        until("an answer to a new echo request", || {
            ensure!(!self.thread.is_finished(), "the requests ended");
            Ok(self.answered.load(Ordering::Relaxed) > next)
        })
    }

    pub(crate) fn finish(self) -> Result<Tally> {
        self.enough.store(true, Ordering::Relaxed);
        let counts = self.thread.join().expect("the thread does not panic")?;
        let of = |wanted: fn(u8) -> bool| counts.iter().filter(|count| wanted(**count)).count();
        Ok(Tally { answered: of(|n| n > 0), repeated: of(|n| n > 1) })
    }
}

/// Gives for each request how often it was answered.
fn flood(
    socket: &OwnedFd,
    to: Ipv4Addr,
    [sent, answered]: &[Arc<AtomicU64>; 2],
    enough: &AtomicBool,
) -> Result<Vec<u8>> {
    let mut counts: Vec<u8> = Vec::new();
    while !enough.load(Ordering::Relaxed) {
        let number = counts.len() as u64;
        counts.push(0);
        // A tap that nobody reads, or whose other side is slow, is a wire that loses.
        match sendto(socket, &request(number), SendFlags::empty(), &SocketAddrV4::new(to, 0)) {
            Ok(_) | Err(Errno::NOBUFS | Errno::AGAIN | Errno::NETDOWN | Errno::HOSTUNREACH) => {}
            Err(error) => return Err(error).context("an echo request"),
        }
        sent.store(counts.len() as u64, Ordering::Relaxed);
        while let Some(number) = answer(socket)? {
            let count = usize::try_from(number).ok().and_then(|number| counts.get_mut(number));
            let count = count.context("an answer to what was not asked")?;
            *count = count.saturating_add(1);
            answered.fetch_max(number + 1, Ordering::Relaxed);
        }
        thread::sleep(PAUSE);
    }
    Ok(counts)
}

fn request(number: u64) -> Vec<u8> {
    let mut message = vec![0; HEADER_BYTES];
    message[0] = ECHO_REQUEST;
    message[4..].copy_from_slice(&MARK);
    message.extend(number.to_be_bytes());
    let words = message.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = !(sum + (sum >> 16)) & 0xffff;
    message[2..4].copy_from_slice(&sum.to_be_bytes()[2..]);
    message
}

/// The number of a request that is answered, if an answer is there.
fn answer(socket: &OwnedFd) -> Result<Option<u64>> {
    loop {
        let mut packet = [0; 128];
        let len = match recv(socket, &mut packet, RecvFlags::empty()) {
            Ok((len, _)) => len,
            Err(Errno::AGAIN) => return Ok(None),
            Err(error) => return Err(error).context("an echo reply"),
        };
        let message = packet[..len].get(IP_HEADER_BYTES..).unwrap_or_default();
        let Some((header, number)) = message.split_first_chunk::<HEADER_BYTES>() else { continue };
        if header[0] == 0
            && header[4..] == MARK
            && let Ok(number) = number.try_into()
        {
            return Ok(Some(u64::from_be_bytes(number)));
        }
    }
}
