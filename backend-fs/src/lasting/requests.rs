//! Every request, with the guest's ids translated.

use std::ffi::CStr;
use std::io;
use std::time::Duration;

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, SetattrIn};

use super::names::{Created, Creation};
use super::open::Entries;
use super::resolve::{At, check_name};
use super::{Inner, Lasting, errno};
use crate::kept;
use crate::record::Spot;
use crate::table::{Place, ROOT};
use crate::ticket;

impl<F: Inner> FileSystem for Lasting<F> {
    type Inode = u64;
    type Handle = u64;
    type DirIter = Entries<F::DirIter>;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        let wanted = self.0.inner.init(capable)?;
        ticket::with(|ticket| ticket.has_mounted = true);
        Ok(wanted)
    }

    fn destroy(&self) {
        let kept = self.0.table().clear();
        kept.into_iter().for_each(|node| self.0.keep.remove(node));
        self.0.inner.destroy();
    }

    fn lookup(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        let core = &self.0;
        let _names = core.names_stay();
        let folder = core.folder(parent)?;
        let entry = core.inner.lookup(ctx, folder, name)?;
        let id = core.identify(&Spot::new(parent, name), &entry, false)?;
        ticket::found(id);
        Ok(Entry { inode: id, ..entry })
    }

    fn forget(&self, _ctx: Context, inode: u64, count: u64) {
        if ticket::with(|ticket| ticket.is_plus) {
            let is_told = ticket::with(|ticket| {
                let found = &mut ticket.told.found;
                found.iter().rposition(|id| *id == inode).map(|index| found.remove(index))
            });
            if is_told.is_some() {
                let gone = self.0.table().unpin(inode);
                self.0.bury(gone);
            }
        } else if inode != ROOT {
            ticket::with(|ticket| ticket.told.forgotten.push((inode, count)));
        }
    }

    fn getattr(
        &self,
        ctx: Context,
        inode: u64,
        _handle: Option<u64>,
    ) -> io::Result<(Attr, Duration)> {
        match self.0.place(inode)? {
            Place::Inner(inner) => self.0.inner.getattr(ctx, inner, None),
            Place::Kept(file) => self.0.attributes(inode, &file),
            Place::Unknown => Err(errno(libc::ESTALE)),
        }
    }

    fn setattr(
        &self,
        ctx: Context,
        inode: u64,
        attr: SetattrIn,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        match self.0.place(inode)? {
            Place::Inner(inner) => {
                let handle = handle.map(|handle| self.0.opened(inode, handle)).transpose()?;
                let handle = handle.and_then(|at| match at {
                    At::Inner(_inner, handle) => Some(handle),
                    At::Kept(_) => None,
                });
                self.0.inner.setattr(ctx, inner, attr, handle, valid)
            }
            Place::Kept(file) => {
                kept::change(&self.0.keep, &file, &attr, valid)?;
                self.0.attributes(inode, &file)
            }
            Place::Unknown => Err(errno(libc::ESTALE)),
        }
    }

    fn readlink(&self, ctx: Context, inode: u64) -> io::Result<Vec<u8>> {
        match self.0.place(inode)? {
            Place::Inner(inner) => self.0.inner.readlink(ctx, inner),
            Place::Kept(file) => kept::target(&file),
            Place::Unknown => Err(errno(libc::ESTALE)),
        }
    }

    fn symlink(
        &self,
        ctx: Context,
        linkname: &CStr,
        parent: u64,
        name: &CStr,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        let inner = &self.0.inner;
        let act = |folder| inner.symlink(ctx, linkname, folder, name, extensions);
        self.0.make(&Spot::new(parent, name), None, act)
    }

    fn mknod(
        &self,
        ctx: Context,
        inode: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        let inner = &self.0.inner;
        let act = |folder| inner.mknod(ctx, folder, name, mode, rdev, umask, extensions);
        self.0.make(&Spot::new(inode, name), None, act)
    }

    fn mkdir(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        let inner = &self.0.inner;
        let act = |folder| inner.mkdir(ctx, folder, name, mode, umask, extensions);
        self.0.make(&Spot::new(parent, name), None, act)
    }

    fn unlink(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()> {
        let act = |folder| self.0.inner.unlink(ctx, folder, name);
        self.0.remove(&Spot::new(parent, name), act)
    }

    fn rmdir(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()> {
        let act = |folder| self.0.inner.rmdir(ctx, folder, name);
        self.0.remove(&Spot::new(parent, name), act)
    }

    fn rename(
        &self,
        ctx: Context,
        olddir: u64,
        oldname: &CStr,
        newdir: u64,
        newname: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        let act = |old, new| self.0.inner.rename(ctx, old, oldname, new, newname, flags);
        let exchanges = flags & libc::RENAME_EXCHANGE != 0;
        self.0.change_name(Spot::new(olddir, oldname), Spot::new(newdir, newname), exchanges, act)
    }

    fn link(&self, ctx: Context, inode: u64, newparent: u64, newname: &CStr) -> io::Result<Entry> {
        let Place::Inner(inner) = self.0.place(inode)? else { return Err(errno(libc::ENOENT)) };
        let number = self.0.table().node(inode).map(|node| node.inode);
        let act = |folder| self.0.inner.link(ctx, inner, folder, newname);
        self.0.make(&Spot::new(newparent, newname), number, act)
    }

    fn open(
        &self,
        ctx: Context,
        inode: u64,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        self.0.open_node(ctx, (inode, false), kill_priv, flags)
    }

    fn opendir(
        &self,
        ctx: Context,
        inode: u64,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        self.0.open_node(ctx, (inode, true), false, flags)
    }

    fn create(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        kill_priv: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Created> {
        let how = Creation { mode, kill_priv, flags, umask, extensions };
        self.0.make_open(ctx, &Spot::new(parent, name), how)
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        ctx: Context,
        inode: u64,
        handle: u64,
        mut w: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        match self.0.opened(inode, handle)? {
            At::Inner(inner, handle) => {
                self.0.inner.read(ctx, inner, handle, w, size, offset, lock_owner, flags)
            }
            At::Kept(file) => w.read_from_file_at(&file, size as usize, offset, None),
        }
    }

    fn write<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        inode: u64,
        handle: u64,
        r: R,
        size: u32,
        mut offset: u64,
        lock_owner: Option<u64>,
        delayed_write: bool,
        kill_priv: bool,
        mut flags: u32,
    ) -> io::Result<usize> {
        let append = libc::O_APPEND.unsigned_abs();
        let opened = self.0.opened(inode, handle)?;
        if !delayed_write
            && flags & append != 0
            && let Some(place) = self.0.place_to_append(inode, size.into())?
        {
            (offset, flags) = (place, flags & !append);
        }
        match opened {
            At::Inner(inner, handle) => self.0.inner.write(
                ctx,
                inner,
                handle,
                r,
                size,
                offset,
                lock_owner,
                delayed_write,
                kill_priv,
                flags,
            ),
            At::Kept(file) => {
                let appends = !delayed_write && flags & append != 0;
                kept::write(&file, r, size as usize, offset, appends)
            }
        }
    }

    fn flush(&self, ctx: Context, inode: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        match self.0.opened(inode, handle)? {
            At::Inner(inner, handle) => self.0.inner.flush(ctx, inner, handle, lock_owner),
            At::Kept(_) => Ok(()),
        }
    }

    fn fsync(&self, ctx: Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        match self.0.opened(inode, handle)? {
            At::Inner(inner, handle) => self.0.inner.fsync(ctx, inner, datasync, handle),
            At::Kept(file) if datasync => file.sync_data(),
            At::Kept(file) => file.sync_all(),
        }
    }

    fn fsyncdir(&self, ctx: Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        match self.0.opened(inode, handle)? {
            At::Inner(inner, handle) => self.0.inner.fsyncdir(ctx, inner, datasync, handle),
            At::Kept(_) => Ok(()),
        }
    }

    fn fallocate(
        &self,
        ctx: Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        match self.0.opened(inode, handle)? {
            At::Inner(inner, handle) => {
                self.0.inner.fallocate(ctx, inner, handle, mode, offset, length)
            }
            At::Kept(file) => kept::allocate(&file, mode, offset, length),
        }
    }

    fn release(
        &self,
        ctx: Context,
        inode: u64,
        flags: u32,
        handle: u64,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        let act = |inner, handle| {
            self.0.inner.release(ctx, inner, flags, handle, flush, flock_release, lock_owner)
        };
        self.0.close_handle(inode, handle, act)
    }

    fn releasedir(&self, ctx: Context, inode: u64, flags: u32, handle: u64) -> io::Result<()> {
        let act = |inner, handle| self.0.inner.releasedir(ctx, inner, flags, handle);
        self.0.close_handle(inode, handle, act)
    }

    fn statfs(&self, ctx: Context, inode: u64) -> io::Result<libc::statvfs64> {
        let inner = self.0.inner_of(inode).unwrap_or(ROOT);
        self.0.inner.statfs(ctx, inner)
    }

    fn setxattr(
        &self,
        ctx: Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        mut flags: u32,
        extra_flags: SetxattrFlags,
    ) -> io::Result<()> {
        let inner = self.0.inner_of(inode)?;
        let create = libc::XATTR_CREATE.unsigned_abs();
        if flags & create != 0 && !self.0.before_attribute(ctx, inner, name) {
            // It may be there by now, but then it is this request's.
            flags &= !create;
        }
        self.0.inner.setxattr(ctx, inner, name, value, flags, extra_flags)
    }

    fn getxattr(
        &self,
        ctx: Context,
        inode: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        self.0.inner.getxattr(ctx, self.0.inner_of(inode)?, name, size)
    }

    fn listxattr(&self, ctx: Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        self.0.inner.listxattr(ctx, self.0.inner_of(inode)?, size)
    }

    fn removexattr(&self, ctx: Context, inode: u64, name: &CStr) -> io::Result<()> {
        let inner = self.0.inner_of(inode)?;
        let existed = self.0.before_attribute(ctx, inner, name);
        match self.0.inner.removexattr(ctx, inner, name) {
            Err(error) if existed && error.raw_os_error() == Some(libc::ENODATA) => Ok(()),
            removed => removed,
        }
    }

    fn readdir(
        &self,
        ctx: Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
    ) -> io::Result<Self::DirIter> {
        match self.0.opened(inode, handle)? {
            At::Inner(inner, handle) => {
                let all = self.0.inner.readdir(ctx, inner, handle, size, offset)?;
                Ok(Entries::new(all))
            }
            At::Kept(_) => Err(errno(libc::ENOENT)),
        }
    }

    fn access(&self, ctx: Context, inode: u64, mask: u32) -> io::Result<()> {
        self.0.inner.access(ctx, self.0.inner_of(inode)?, mask)
    }

    fn lseek(
        &self,
        ctx: Context,
        inode: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        match self.0.opened(inode, handle)? {
            At::Inner(inner, handle) => self.0.inner.lseek(ctx, inner, handle, offset, whence),
            At::Kept(file) => kept::look_for(&file, offset, whence),
        }
    }

    fn copyfilerange(
        &self,
        ctx: Context,
        inode_in: u64,
        handle_in: u64,
        offset_in: u64,
        inode_out: u64,
        handle_out: u64,
        offset_out: u64,
        len: u64,
        flags: u64,
    ) -> io::Result<usize> {
        let (from, to) =
            (self.0.opened(inode_in, handle_in)?, self.0.opened(inode_out, handle_out)?);
        let (At::Inner(inode_in, handle_in), At::Inner(inode_out, handle_out)) = (from, to) else {
            // A guest's kernel then copies by itself.
            return Err(errno(libc::EXDEV));
        };
        self.0.inner.copyfilerange(
            ctx, inode_in, handle_in, offset_in, inode_out, handle_out, offset_out, len, flags,
        )
    }

    fn syncfs(&self, ctx: Context, inode: u64) -> io::Result<()> {
        let inner = self.0.inner_of(inode).unwrap_or(ROOT);
        self.0.inner.syncfs(ctx, inner)
    }
}
