//! virtiofsd's file server on the shared folder, and every way in which a request can fail it.
//!
//! A request that a predecessor of this process had taken is served again, unless its answer is
//! written already: `lasting` knows. virtiofsd's own loop ends the process when a request is malformed. Here such a request gets an
//! error for an answer, and the next one is served.

use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};

use backend_daemon::logging::chain as error_chain;
use backend_daemon::ring::Chain;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::filesystem::OpenOptions;
use virtiofsd::passthrough::read_only::PassthroughFsRo;
use virtiofsd::passthrough::{Config, PassthroughFs};
use virtiofsd::server::Server;

use crate::args::{Args, Cache};
use crate::inheritance::Inheritance;
use crate::keep::{Keep, MOST_KEPT};
use crate::lasting::{Inner, Lasting, Manner};
use crate::mount::{self, MountError};
use crate::record::Key;
use crate::request::Request;
use crate::sandbox::Place;
use crate::sys::{View, ViewError};
use crate::ticket;

/// Descriptors that the guest can't take from us: memory regions (509 at most), queues, the daemon's
/// own, and files that have lost their names, which virtiofsd does not count.
const RESERVED_FDS: u64 = 1024 + 2 * MOST_KEPT as u64;
/// What is asked for: each file that the guest knows is one.
const WANTED_FDS: u64 = 1_000_000;
/// With fewer the share is of no use.
const MIN_GUEST_FDS: u64 = 128;

/// Why the share can't be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShareError {
    /// The limit on open files can't be raised.
    #[error("cannot raise the limit on open files")]
    Limit(#[source] io::Error),
    /// The limit on open files is too low.
    #[error("{limit} open files are too few: {needed} are needed")]
    TooFewFiles {
        /// The limit.
        limit: u64,
        /// The least that is needed.
        needed: u64,
    },
    /// virtiofsd can't serve the folder.
    #[error("cannot serve the folder")]
    Open(#[source] io::Error),
    /// The guest's mount can't be taken up again.
    #[error("cannot take up the guest's mount")]
    Mount(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The share's path is no text.
    #[error("the path of the shared folder is not UTF-8")]
    Path,
}

/// Why one request has no proper answer: the guest's fault, all of it, or a bug of virtiofsd.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    #[error("it has no header")]
    NoHeader,
    #[error("it leaves no room for an answer")]
    NoRoom,
    #[error("its buffers can't be used")]
    View(#[from] ViewError),
    #[error("it is malformed")]
    Malformed(#[from] virtiofsd::Error),
    #[error("virtiofsd panicked on it")]
    Panicked,
}

/// How the folder is served.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    cache: Cache,
    pub(crate) read_only: bool,
    xattr: bool,
    announce_submounts: bool,
}

impl Options {
    /// What the arguments ask for.
    #[must_use]
    pub fn of(args: &Args) -> Self {
        let &Args { cache, read_only, xattr, announce_submounts, .. } = args;
        Self { cache, read_only, xattr, announce_submounts }
    }

    fn manner(self) -> Manner {
        let open_options = match self.cache {
            Cache::Never => OpenOptions::DIRECT_IO,
            Cache::Auto | Cache::Always => OpenOptions::empty(),
        };
        let attr_timeout = self.cache.timeout();
        Manner { attr_timeout, open_options, read_only: self.read_only }
    }

    fn config(self, place: Place, guest_fds: u64) -> Result<Config, ShareError> {
        let root_dir = place.root_dir.into_os_string().into_string();
        Ok(Config {
            entry_timeout: self.cache.timeout(),
            attr_timeout: self.cache.timeout(),
            cache_policy: self.cache.policy(),
            root_dir: root_dir.map_err(|_path| ShareError::Path)?,
            xattr: self.xattr,
            proc_sfd_rawfd: Some(place.proc_self_fd),
            announce_submounts: self.announce_submounts,
            readdirplus: self.cache != Cache::Never,
            guest_fd_limit: guest_fds,
            ..Config::default()
        })
    }
}

/// The file server; shared by all workers, it locks what it has to.
pub struct Share(Kind);

enum Kind {
    Writable(Served<PassthroughFs>),
    ReadOnly(Served<PassthroughFsRo>),
}

struct Served<F: Inner> {
    server: Server<Lasting<F>>,
    /// The same that the server has.
    lasting: Lasting<F>,
}

impl Share {
    /// Serves the folder in `place`; the guest may hold `guest_fds` files open.
    ///
    /// # Errors
    ///
    /// Fails if virtiofsd can't serve the folder, or not as a predecessor did.
    pub fn open(
        place: Place,
        guest_fds: u64,
        options: Options,
        inheritance: Inheritance,
    ) -> Result<Self, ShareError> {
        let proc_self_fd = place.proc_self_fd.try_clone().map_err(ShareError::Open)?;
        let Inheritance { table, store, held } = inheritance;
        let keep = Keep::new(&place.root_dir, proc_self_fd, store).map_err(ShareError::Open)?;
        let manner = options.manner();
        let config = options.config(place, guest_fds)?;
        let kind = if options.read_only {
            let inner = PassthroughFsRo::new(config).map_err(ShareError::Open)?;
            Kind::ReadOnly(Served::new(Lasting::new(inner, table, keep, manner), held)?)
        } else {
            let inner = PassthroughFs::new(config).map_err(ShareError::Open)?;
            Kind::Writable(Served::new(Lasting::new(inner, table, keep, manner), held)?)
        };
        Ok(Self(kind))
    }

    /// Serves one request of a queue; gives the answer's length, in bytes, and what was wrong with
    /// it.
    pub(crate) fn serve(&self, queue: usize, chain: &Chain) -> (u32, Option<Fault>) {
        match &self.0 {
            Kind::Writable(served) => served.serve(queue, chain),
            Kind::ReadOnly(served) => served.serve(queue, chain),
        }
    }
}

impl<F: Inner> Served<F> {
    fn new(lasting: Lasting<F>, held: Vec<(u64, OwnedFd)>) -> Result<Self, ShareError> {
        let server = Server::new(lasting.clone());
        if let Some(session) = lasting.session() {
            match mount::again(&server, &session) {
                Ok(()) => {
                    lasting.recover(held);
                    return Ok(Self { server, lasting });
                }
                Err(MountError::Memory(error)) => return Err(ShareError::Mount(error)),
                // The guest was quick to change its request after it was taken.
                Err(error) => log::warn!("the guest's mount is over: {}", error_chain(&error)),
            }
            server.destroy();
        }
        lasting.discard(&held);
        Ok(Self { server, lasting })
    }

    fn serve(&self, queue: usize, chain: &Chain) -> (u32, Option<Fault>) {
        let Some(request) = Request::read(chain) else { return (0, Some(Fault::NoHeader)) };
        let key = Key { unique: request.unique(), head: chain.head() };
        if let Some(written_bytes) = self.lasting.begin(queue, key, chain.is_repeated()) {
            return (written_bytes, None);
        }
        ticket::with(|ticket| ticket.is_plus = request.is_readdirplus());
        match self.attempt(request, chain) {
            Ok(written_bytes) => {
                let written_bytes = u32::try_from(written_bytes).unwrap_or(u32::MAX);
                self.lasting.finish(Some(written_bytes));
                (written_bytes, None)
            }
            Err(fault) => {
                self.lasting.finish(None);
                (request.refuse(chain, libc::EIO), Some(fault))
            }
        }
    }

    fn attempt(&self, request: Request, chain: &Chain) -> Result<usize, Fault> {
        if !request.has_room(chain.writable_len()) {
            return Err(Fault::NoRoom);
        }
        let view = View::of(chain)?;
        let (reader, writer) = (view.reader()?, view.writer()?);
        // virtiofsd restores the thread's user and working directory while it unwinds.
        let handle = AssertUnwindSafe(|| self.handle(request, reader, writer));
        let written_bytes = match catch_unwind(handle) {
            Ok(handled) => handled?,
            Err(_panic) => return Err(Fault::Panicked),
        };
        if let Some(session) = request.session(chain)
            && ticket::with(|ticket| ticket.has_mounted)
        {
            self.lasting.mounted(&session);
        }
        Ok(written_bytes)
    }

    fn handle(
        &self,
        request: Request,
        reader: Reader<'_>,
        writer: Writer<'_>,
    ) -> virtiofsd::Result<usize> {
        /// virtiofsd could ask the frontend for shared memory, but never does.
        const NO_FRONTEND: Option<&mut ()> = None;
        if request.begins_mount() {
            // A guest that crashed has not said that its last mount is over.
            self.server.destroy();
        }
        self.server.handle_message(reader, writer, NO_FRONTEND)
    }
}

/// Raises the limit on open files, and gives how many of them the guest may hold.
///
/// # Errors
///
/// Fails if the limit can't be raised to what is needed at least.
pub fn raise_file_limit() -> Result<u64, ShareError> {
    let limit = raise_limit().map_err(ShareError::Limit)?;
    let guest_fds = limit.saturating_sub(RESERVED_FDS);
    if guest_fds < MIN_GUEST_FDS {
        return Err(ShareError::TooFewFiles { limit, needed: RESERVED_FDS + MIN_GUEST_FDS });
    }
    Ok(guest_fds)
}

fn raise_limit() -> io::Result<u64> {
    let before = getrlimit(Resource::Nofile);
    let hard = before.maximum.unwrap_or(u64::MAX);
    if before.current.is_none_or(|soft| soft >= WANTED_FDS) {
        return Ok(before.current.unwrap_or(u64::MAX));
    }
    let set = |limit: u64| {
        let wanted = Rlimit { current: Some(limit), maximum: Some(limit.max(hard)) };
        setrlimit(Resource::Nofile, wanted).map(|()| limit)
    };
    // To go beyond the hard limit takes a right that is not always there.
    Ok(set(WANTED_FDS).or_else(|_no_right| set(hard))?)
}
