//! Requests on a file that has no name any more and was open in a predecessor: virtiofsd can't take
//! over a file, so they are carried out here.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{
    AtFlags, FallocateFlags, Gid, Mode, OFlags, SeekFrom, Timespec, Timestamps, UTIME_NOW,
    UTIME_OMIT, Uid, chmodat, chownat, fallocate, fstat, ftruncate, readlinkat, seek, utimensat,
};
use virtiofsd::filesystem::{SetattrValid, ZeroCopyReader};
use virtiofsd::fuse::{Attr, SetattrIn};
use virtiofsd::oslib::WritevFlags;
use virtiofsd::soft_idmap::Id;

use crate::keep::Keep;

/// Its attributes.
pub(crate) fn attributes(file: &OwnedFd) -> io::Result<Attr> {
    let stat = fstat(file)?;
    let number = |value: i64| u64::try_from(value).unwrap_or(0);
    let nanoseconds = |value: u64| u32::try_from(value).unwrap_or(0);
    Ok(Attr {
        ino: stat.st_ino,
        size: number(stat.st_size),
        blocks: number(stat.st_blocks),
        atime: number(stat.st_atime),
        mtime: number(stat.st_mtime),
        ctime: number(stat.st_ctime),
        atimensec: nanoseconds(stat.st_atime_nsec),
        mtimensec: nanoseconds(stat.st_mtime_nsec),
        ctimensec: nanoseconds(stat.st_ctime_nsec),
        mode: stat.st_mode,
        nlink: u32::try_from(stat.st_nlink).unwrap_or(u32::MAX),
        uid: stat.st_uid.into(),
        gid: stat.st_gid.into(),
        rdev: u32::try_from(stat.st_rdev).unwrap_or(0),
        blksize: u32::try_from(stat.st_blksize).unwrap_or(4096),
        flags: 0,
    })
}

/// Changes its attributes.
pub(crate) fn change(
    keep: &Keep,
    file: &OwnedFd,
    wanted: &SetattrIn,
    valid: SetattrValid,
) -> io::Result<()> {
    let number = file.as_raw_fd().to_string();
    if valid.contains(SetattrValid::MODE) {
        let mode = Mode::from_raw_mode(wanted.mode & 0o7777);
        chmodat(keep.proc_self_fd(), number.as_str(), mode, AtFlags::empty())?;
    }
    if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
        let user = Uid::from_raw(wanted.uid.into_inner());
        let group = Gid::from_raw(wanted.gid.into_inner());
        let user = valid.contains(SetattrValid::UID).then_some(user);
        let group = valid.contains(SetattrValid::GID).then_some(group);
        chownat(file, "", user, group, AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW)?;
    }
    if valid.contains(SetattrValid::SIZE) {
        ftruncate(keep.reopen(file, OFlags::RDWR | OFlags::NONBLOCK)?, wanted.size)?;
    }
    if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
        let time = |is_now, is_set, seconds: u64, nanoseconds: u32| {
            let fixed = if is_now { UTIME_NOW } else { UTIME_OMIT };
            if is_set && !is_now {
                let tv_sec = i64::try_from(seconds).unwrap_or(i64::MAX);
                return Timespec { tv_sec, tv_nsec: nanoseconds.into() };
            }
            Timespec { tv_sec: 0, tv_nsec: fixed }
        };
        let is = |flag| valid.contains(flag);
        let (atime, mtime) = (SetattrValid::ATIME, SetattrValid::MTIME);
        let (atime_now, mtime_now) = (SetattrValid::ATIME_NOW, SetattrValid::MTIME_NOW);
        let times = Timestamps {
            last_access: time(is(atime_now), is(atime), wanted.atime, wanted.atimensec),
            last_modification: time(is(mtime_now), is(mtime), wanted.mtime, wanted.mtimensec),
        };
        utimensat(keep.proc_self_fd(), number.as_str(), &times, AtFlags::empty())?;
    }
    Ok(())
}

/// Writes to it.
pub(crate) fn write(
    file: &File,
    mut data: impl ZeroCopyReader,
    len: usize,
    at: u64,
    appends: bool,
) -> io::Result<usize> {
    data.write_to_file_at(file, len, at, appends.then_some(WritevFlags::RWF_APPEND))
}

/// Looks for data or a hole in it.
pub(crate) fn look_for(file: &File, offset: u64, whence: u32) -> io::Result<u64> {
    let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
    let signed = i64::try_from(offset).map_err(|_too_large| invalid())?;
    let to = match i32::try_from(whence) {
        Ok(libc::SEEK_SET) => SeekFrom::Start(offset),
        Ok(libc::SEEK_CUR) => SeekFrom::Current(signed),
        Ok(libc::SEEK_END) => SeekFrom::End(signed),
        Ok(libc::SEEK_DATA) => SeekFrom::Data(offset),
        Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
        _ => return Err(invalid()),
    };
    Ok(seek(file, to)?)
}

/// Changes which of its space is taken.
pub(crate) fn allocate(file: &File, mode: u32, offset: u64, len: u64) -> io::Result<()> {
    Ok(fallocate(file, FallocateFlags::from_bits_retain(mode), offset, len)?)
}

/// Where it leads to, if it is a symbolic link.
pub(crate) fn target(file: &OwnedFd) -> io::Result<Vec<u8>> {
    Ok(readlinkat(file, "", Vec::new())?.into_bytes())
}
