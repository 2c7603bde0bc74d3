//! Takes the ELF kernel out of a bzImage.
//!
//! Offsets: linux Documentation/arch/x86/boot.rst, "The real-mode kernel header". A PVH boot of
//! the ELF file skips the self-decompression, which costs a second on an emulated processor.

use anyhow::{Context, Result, bail};
use ruzstd::decoding::StreamingDecoder;
use std::io::{Cursor, Read};

const SETUP_SECTORS: usize = 0x1f1;
const HEADER_MAGIC: usize = 0x202;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const SECTOR_BYTES: usize = 512;
/// The kernel's build appends the size of the unpacked kernel to the payload.
const SIZE_TRAILER_BYTES: usize = 4;

/// Returns the ELF file that the image unpacks at boot.
///
/// # Errors
/// The image is not a bzImage, is cut short, or is compressed by neither zstd nor xz.
pub fn vmlinux(image: &[u8]) -> Result<Vec<u8>> {
    if image.get(HEADER_MAGIC..HEADER_MAGIC + 4) != Some(b"HdrS") {
        bail!("not a bzImage: no boot header");
    }
    let sectors = usize::from(image[SETUP_SECTORS]);
    let sectors = if sectors == 0 { 4 } else { sectors };
    let start = (sectors + 1) * SECTOR_BYTES + word(image, PAYLOAD_OFFSET)?;
    let length = word(image, PAYLOAD_LENGTH)?.saturating_sub(SIZE_TRAILER_BYTES);
    let payload = image.get(start..start.saturating_add(length)).context("bzImage cut short")?;
    let elf = if payload.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        let mut elf = Vec::new();
        StreamingDecoder::new(payload)
            .context("bad zstd payload")?
            .read_to_end(&mut elf)
            .context("bad zstd payload")?;
        elf
    } else if payload.starts_with(b"\xfd7zXZ\0") {
        unxz(payload)?
    } else {
        bail!("the kernel in this bzImage is compressed by neither zstd nor xz");
    };
    if !elf.starts_with(b"\x7fELF") {
        bail!("the bzImage does not contain an ELF kernel");
    }
    Ok(elf)
}

/// Unpacks an xz stream.
///
/// # Errors
/// The stream is damaged.
pub fn unxz(packed: &[u8]) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    lzma_rs::xz_decompress(&mut Cursor::new(packed), &mut out).context("bad xz data")?;
    Ok(out)
}

fn word(image: &[u8], offset: usize) -> Result<usize> {
    let bytes = image.get(offset..offset + 4).context("bzImage cut short")?;
    let word = u32::from_le_bytes(bytes.try_into().context("four bytes")?);
    usize::try_from(word).context("offset beyond this machine's memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0u8; 2 * SECTOR_BYTES];
        image[SETUP_SECTORS] = 1;
        image[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
        let length = u32::try_from(payload.len() + SIZE_TRAILER_BYTES).unwrap();
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&length.to_le_bytes());
        image.extend_from_slice(payload);
        image.extend_from_slice(&[0; SIZE_TRAILER_BYTES]);
        image
    }

    #[test]
    fn an_xz_kernel_comes_out_whole() {
        let mut packed = Vec::new();
        lzma_rs::xz_compress(&mut Cursor::new(b"\x7fELF and more"), &mut packed).unwrap();
        assert_eq!(vmlinux(&image(&packed)).unwrap(), b"\x7fELF and more");
    }

    #[test]
    fn what_is_no_bzimage_is_refused() {
        assert!(vmlinux(b"").is_err());
        assert!(vmlinux(&[0; 4096]).is_err());
        assert!(vmlinux(&image(b"unknown")).is_err());
    }

    #[test]
    fn a_payload_that_points_outside_is_refused() {
        let mut bad = image(b"\xfd7zXZ\0");
        bad[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(vmlinux(&bad).is_err());
    }
}
