#![expect(
    unsafe_code,
    reason = "file I/O on guest memory, io_uring and open file description locks"
)]
//! The block device's system calls.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::Duration;

use io_uring::{IoUring, Probe, opcode, register::Restriction, squeue, types};

use crate::job::{Job, Piece, Step};

/// How long to wait when the kernel has no memory for a request.
const MEMORY_PAUSE: Duration = Duration::from_millis(1);
const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// Locks the whole file for its open file description, without waiting.
pub(crate) fn lock(fd: BorrowedFd<'_>, exclusive: bool) -> io::Result<()> {
    let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
    let lock = libc::flock {
        l_type: kind.try_into().unwrap_or_default(),
        l_whence: libc::SEEK_SET.try_into().unwrap_or_default(),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the command takes a pointer to a whole `flock`, which outlives the call.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A step's vectors.
///
/// Invariant: they point to memory that stays in place while the job that gave them exists.
struct Vectors(Vec<libc::iovec>);

// SAFETY: vectors are addresses and lengths in memory that belongs to the process, not a thread.
unsafe impl Send for Vectors {}

impl Vectors {
    fn of(pieces: &[Piece]) -> Self {
        let vector = |piece: &Piece| match piece {
            Piece::Guest(segment) => segment.as_iovec(),
            Piece::Bounce { address, len } => {
                libc::iovec { iov_base: address.cast(), iov_len: *len }
            }
        };
        Self(pieces.iter().map(vector).collect())
    }
}

/// Takes a job's next step, now.
pub(crate) fn take_step(disk: BorrowedFd<'_>, job: &mut Job) -> io::Result<u32> {
    let disk = disk.as_raw_fd();
    let result = match job.step() {
        Step::Read { pieces, offset_bytes } => {
            let Vectors(vectors) = Vectors::of(&pieces);
            // SAFETY: the vectors point to memory that lives as long as `job`, which is borrowed
            // for the call; no Rust reference points to it.
            unsafe { libc::preadv(disk, vectors.as_ptr(), count(&vectors), offset(offset_bytes)) }
        }
        Step::Write { pieces, offset_bytes, write_through } => {
            let Vectors(vectors) = Vectors::of(&pieces);
            let flags = if write_through { libc::RWF_DSYNC } else { 0 };
            let (count, offset) = (count(&vectors), offset(offset_bytes));
            // SAFETY: as above; the kernel only reads.
            unsafe { libc::pwritev2(disk, vectors.as_ptr(), count, offset, flags) }
        }
        Step::Flush => {
            // SAFETY: no memory is involved.
            unsafe { libc::fdatasync(disk) as isize }
        }
        Step::Punch { offset_bytes, len_bytes } => allocate(disk, PUNCH, offset_bytes, len_bytes),
        Step::Zero { offset_bytes, len_bytes } => allocate(disk, ZERO, offset_bytes, len_bytes),
    };
    u32::try_from(result).map_err(|_negative| io::Error::last_os_error())
}

fn allocate(disk: i32, mode: i32, offset_bytes: u64, len_bytes: u64) -> isize {
    // SAFETY: no memory is involved.
    unsafe { libc::fallocate(disk, mode, offset(offset_bytes), offset(len_bytes)) as isize }
}

/// The number of vectors; a step has no more than the kernel takes.
fn count(vectors: &[libc::iovec]) -> i32 {
    i32::try_from(vectors.len()).unwrap_or(i32::MAX)
}

/// An offset within the disk: its size was told by the kernel in this very type.
fn offset(bytes: u64) -> libc::off_t {
    libc::off_t::try_from(bytes).unwrap_or(libc::off_t::MAX)
}

/// Jobs whose next step the kernel takes through a ring of submissions and completions.
///
/// The ring can do nothing but what [`Step`]s need, whoever fills it: the kernel holds it to that,
/// since system call filters don't see what is submitted. It could do so on other descriptors of
/// the process than the disk's, as the plain system calls for the same things can.
///
/// The disk is no registered file of the ring: the kernel lets go of those tens of milliseconds
/// after the process is gone, and a successor would wait for the image's lock as long. So each
/// step holds a reference to the disk, and the last one to end releases the lock.
pub(crate) struct KernelRing {
    ring: IoUring,
    /// Open for as long as steps may name it.
    disk: OwnedFd,
    /// By their number, which is the submission's user data. The memory that the kernel works on
    /// belongs to the job, and the vectors that it reads to its place here.
    places: Vec<Option<(Job, Vectors)>>,
    free: Vec<usize>,
}

impl KernelRing {
    /// A ring for so many jobs at a time on `disk`.
    pub(crate) fn new(disk: BorrowedFd<'_>, jobs: u16) -> io::Result<Self> {
        let ring = IoUring::builder().dontfork().setup_r_disabled().build(u32::from(jobs))?;
        let wanted = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if !wanted.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::Error::from(io::ErrorKind::Unsupported));
        }
        let mut allowed: Vec<_> = wanted.into_iter().map(Restriction::sqe_op).collect();
        ring.submitter().register_restrictions(&mut allowed)?;
        ring.submitter().register_enable_rings()?;
        let places = (0..jobs).map(|_place| None).collect();
        let disk = disk.try_clone_to_owned()?;
        Ok(Self { ring, disk, places, free: (0..usize::from(jobs)).rev().collect() })
    }

    /// The descriptor that can be read when a job's step has ended.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns the descriptor and outlives the borrow.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    pub(crate) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// Queues a job's next step. Gives the job back if there is no place for it.
    pub(crate) fn queue(&mut self, mut job: Job) -> Result<(), Box<Job>> {
        let Some(place) = self.free.pop() else {
            return Err(Box::new(job));
        };
        let (entry, vectors) = entry(types::Fd(self.disk.as_raw_fd()), job.step());
        let entry = entry.user_data(place as u64);
        self.places[place] = Some((job, vectors));
        // SAFETY: the entry points to the vectors and they to the job's memory; both stay in
        // `places`, where nobody touches them, until the completion with this number comes.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_ok() {
            return Ok(());
        }
        // Not reached while there are as many submissions as places; nothing was submitted.
        self.free.push(place);
        match self.places[place].take() {
            Some((job, _vectors)) => Err(Box::new(job)),
            None => Ok(()),
        }
    }

    /// Hands the queued steps to the kernel, and waits until `wanted` have ended.
    pub(crate) fn submit(&mut self, wanted: usize) -> io::Result<()> {
        while wanted > 0 || !self.ring.submission().is_empty() {
            match self.ring.submit_and_wait(wanted) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The kernel is short of memory: what is queued must not be forgotten.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                    thread::sleep(MEMORY_PAUSE);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A job whose step has ended, and how.
    pub(crate) fn ended(&mut self) -> Option<(Job, io::Result<u32>)> {
        loop {
            let completion = self.ring.completion().next()?;
            let place = usize::try_from(completion.user_data()).ok()?;
            let Some((job, vectors)) = self.places.get_mut(place).and_then(Option::take) else {
                continue;
            };
            drop(vectors);
            self.free.push(place);
            let result = u32::try_from(completion.result())
                .map_err(|_negative| io::Error::from_raw_os_error(-completion.result()));
            return Some((job, result));
        }
    }
}

impl Drop for KernelRing {
    fn drop(&mut self) {
        // The kernel may still write there; it happens only when the process is about to end.
        if self.in_flight() > 0 {
            mem::forget(mem::take(&mut self.places));
        }
    }
}

fn entry(disk: types::Fd, step: Step) -> (squeue::Entry, Vectors) {
    match step {
        Step::Read { pieces, offset_bytes } => {
            let vectors = Vectors::of(&pieces);
            let count = count(&vectors.0).unsigned_abs();
            let read = opcode::Readv::new(disk, vectors.0.as_ptr(), count).offset(offset_bytes);
            (read.build(), vectors)
        }
        Step::Write { pieces, offset_bytes, write_through } => {
            let vectors = Vectors::of(&pieces);
            let count = count(&vectors.0).unsigned_abs();
            let flags = if write_through { libc::RWF_DSYNC } else { 0 };
            let write = opcode::Writev::new(disk, vectors.0.as_ptr(), count)
                .offset(offset_bytes)
                .rw_flags(flags);
            (write.build(), vectors)
        }
        Step::Flush => {
            let flush = opcode::Fsync::new(disk).flags(types::FsyncFlags::DATASYNC);
            (flush.build(), Vectors(Vec::new()))
        }
        Step::Punch { offset_bytes, len_bytes } => {
            (allocation(disk, PUNCH, offset_bytes, len_bytes), Vectors(Vec::new()))
        }
        Step::Zero { offset_bytes, len_bytes } => {
            (allocation(disk, ZERO, offset_bytes, len_bytes), Vectors(Vec::new()))
        }
    }
}

fn allocation(disk: types::Fd, mode: i32, offset_bytes: u64, len_bytes: u64) -> squeue::Entry {
    opcode::Fallocate::new(disk, len_bytes).offset(offset_bytes).mode(mode).build()
}
