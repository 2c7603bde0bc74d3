//! The Linux kernel of guests and of the emulated host: Debian's 6.12 for clouds, as an ELF file
//! that boots by PVH, with its modules unpacked and unsigned. It is never installed.

use super::apt::PrivateApt;
use crate::bzimage;
use crate::cache::Cache;
use crate::modules::{self, Module, Modules, dependencies, name_of, without_signature};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// To be counted up when what is made here changes.
const FORMAT: &str = "1";
const NAME_START: &str = "linux-image-6.12.";
const NAME_END: &str = "-cloud-amd64";
const BZIMAGE: &str = "vmlinuz";

/// A kernel in the cache.
#[derive(Debug)]
pub struct Kernel {
    folder: PathBuf,
    release: String,
    modules: Modules,
    built_in: Vec<String>,
}

impl Kernel {
    /// The kernel, fetched if it is not in the cache yet.
    ///
    /// # Errors
    /// The package cannot be fetched or is not as expected.
    pub fn prepare(cache: &Cache) -> Result<Self> {
        let what = "fetching the Linux kernel (Debian's 6.12 for clouds)";
        let folder = cache.entry(&format!("kernel-6.12-{FORMAT}"), what, |folder| {
            let apt = PrivateApt::open(cache)?;
            make(&apt.newest(NAME_START, NAME_END)?, &apt, folder)
        })?;
        Self::read(folder)
    }

    /// The uncompressed ELF file.
    pub fn vmlinux(&self) -> PathBuf {
        self.folder.join("vmlinux")
    }

    /// The same kernel as Debian ships it, for those who boot it so. A cache that was filled when
    /// it was not kept yet gets it now.
    ///
    /// # Errors
    /// The package cannot be fetched or is not as expected.
    pub fn bzimage(&self, cache: &Cache) -> Result<PathBuf> {
        let kept = self.folder.join(BZIMAGE);
        if kept.exists() {
            return Ok(kept);
        }
        let release = &self.release;
        let name = format!("bzimage-{}", self.identity());
        cache.entry(&name, "fetching the Linux kernel as a bzImage", |image| {
            let unpacked = image.with_extension("package");
            PrivateApt::open(cache)?.unpack(&format!("linux-image-{release}"), &unpacked)?;
            fs::rename(unpacked.join(format!("boot/vmlinuz-{release}")), image)
                .context("the package has no kernel where it is expected")?;
            fs::remove_dir_all(&unpacked).context("cannot remove the unpacked package")
        })
    }

    /// What `uname -r` says in it.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// The folder that becomes `/lib/modules/RELEASE`.
    pub fn modules_folder(&self) -> PathBuf {
        self.folder.join("modules")
    }

    /// The files to load for the wanted modules, in order; see [`modules::load_order`].
    ///
    /// # Errors
    /// The kernel does not have one of them.
    pub fn load_order(&self, wanted: &[&str]) -> Result<Vec<PathBuf>> {
        modules::load_order(&self.modules, &self.built_in, wanted)
    }

    /// What tells this kernel from another, for keys of what is made from it.
    pub fn identity(&self) -> String {
        format!("{}-{FORMAT}", self.release)
    }

    fn read(folder: PathBuf) -> Result<Self> {
        let text = |name: &str| {
            let path = folder.join(name);
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        let release = text("release")?;
        let built_in = text("modules/modules.builtin")?.lines().map(name_of_path).collect();
        let mut modules = Modules::new();
        for line in text("dependencies")?.lines() {
            let mut words = line.split(' ').map(str::to_owned);
            let Some(file) = words.next() else { continue };
            let name = name_of_path(&file);
            let file = folder.join("modules").join(file);
            modules.insert(name, Module { file, needs: words.collect() });
        }
        Ok(Self { folder, release, modules, built_in })
    }
}

fn make(package: &str, apt: &PrivateApt, folder: &Path) -> Result<()> {
    let unpacked = folder.join("package");
    apt.unpack(package, &unpacked)?;
    let release = package.trim_start_matches("linux-image-");
    let image = unpacked.join(format!("boot/vmlinuz-{release}"));
    let image = fs::read(&image).with_context(|| format!("cannot read {}", image.display()))?;
    fs::write(folder.join("vmlinux"), bzimage::vmlinux(&image)?)?;
    fs::write(folder.join(BZIMAGE), &image)?;
    let modules = folder.join("modules");
    fs::rename(unpacked.join("lib/modules").join(release), &modules)
        .context("the package has no modules where they are expected")?;
    let mut lines = Vec::new();
    unpack_modules(&modules, &modules, &mut lines)?;
    lines.sort();
    fs::write(folder.join("dependencies"), lines.concat())?;
    fs::write(folder.join("release"), release)?;
    fs::remove_dir_all(unpacked).context("cannot remove the unpacked package")
}

/// Replaces each packed module beneath `folder` by its plain file, and lists it.
fn unpack_modules(top: &Path, folder: &Path, lines: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            unpack_modules(top, &path, lines)?;
            continue;
        }
        let name = path.to_string_lossy().into_owned();
        let plain = match name.strip_suffix(".xz") {
            Some(plain) if plain.ends_with(".ko") => plain,
            None if name.ends_with(".ko") => &name,
            Some(_) | None => continue,
        };
        let bytes = fs::read(&path).with_context(|| format!("cannot read {name}"))?;
        let bytes = if name == plain { bytes } else { bzimage::unxz(&bytes)? };
        let module = without_signature(&bytes);
        fs::remove_file(&path)?;
        fs::write(plain, module).with_context(|| format!("cannot write {plain}"))?;
        let within = Path::new(plain).strip_prefix(top).context("a module outside its folder")?;
        let mut words = vec![within.to_string_lossy().into_owned()];
        words.extend(dependencies(module));
        lines.push(format!("{}\n", words.join(" ")));
    }
    Ok(())
}

fn name_of_path(path: &str) -> String {
    name_of(path.rsplit('/').next().unwrap_or(path))
}
