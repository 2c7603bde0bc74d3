//! Kernel modules: plain files out of packed and signed ones, and the order to load them in.
//!
//! A module that is already unpacked and carries no signature loads several times faster on an
//! emulated processor. Dependencies come from the modules themselves (`depends=` in `.modinfo`),
//! since a package that was not installed has no `modules.dep`.

use anyhow::{Result, bail};
use std::collections::BTreeMap;
use std::path::PathBuf;

const SIGNATURE_MAGIC: &[u8] = b"~Module signature appended~\n";
/// `struct module_signature` of linux include/linux/module_signature.h; its last field is the
/// length of the signature, big endian.
const SIGNATURE_INFO_BYTES: usize = 12;

/// The module without its appended signature, if it has one.
pub fn without_signature(module: &[u8]) -> &[u8] {
    let Some(signed) = module.strip_suffix(SIGNATURE_MAGIC) else { return module };
    let Some((_, length)) = signed.split_last_chunk::<4>() else { return module };
    let Ok(length) = usize::try_from(u32::from_be_bytes(*length)) else { return module };
    let end = signed.len().checked_sub(SIGNATURE_INFO_BYTES + length);
    end.map_or(module, |end| &module[..end])
}

/// The names of the modules that this one needs, from its `.modinfo`.
pub fn dependencies(module: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(at) = module.windows(key.len()).position(|window| window == key) else {
        return Vec::new();
    };
    let rest = &module[at + key.len()..];
    let end = rest.iter().position(|byte| *byte == 0).unwrap_or(rest.len());
    let names = String::from_utf8_lossy(&rest[..end]);
    names.split(',').filter(|name| !name.is_empty()).map(name_of).collect()
}

/// A module's name as the kernel writes it: `virtio-rng.ko` and `virtio_rng` are one module.
pub fn name_of(file: &str) -> String {
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// One module of a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Its plain file.
    pub file: PathBuf,
    /// The names of the modules it needs.
    pub needs: Vec<String>,
}

/// All modules of a kernel, by name.
pub type Modules = BTreeMap<String, Module>;

/// The files to load, each after what it needs, for the wanted modules. Names that `built_in`
/// lists need no file.
///
/// # Errors
/// A module is neither there nor built in, or modules need each other in a ring.
pub fn load_order(modules: &Modules, built_in: &[String], wanted: &[&str]) -> Result<Vec<PathBuf>> {
    let mut order = Vec::new();
    let mut path = Vec::new();
    for name in wanted {
        visit(modules, built_in, &name_of(name), &mut (&mut order, &mut path))?;
    }
    Ok(order)
}

type Walk<'a> = (&'a mut Vec<PathBuf>, &'a mut Vec<String>);

fn visit(modules: &Modules, built_in: &[String], name: &str, walk: &mut Walk<'_>) -> Result<()> {
    if walk.1.iter().any(|seen| seen == name) {
        bail!("kernel modules need each other: {} {name}", walk.1.join(" "));
    }
    let Some(module) = modules.get(name) else {
        if built_in.iter().any(|known| known == name) {
            return Ok(());
        }
        bail!("the kernel has no module {name}");
    };
    if walk.0.contains(&module.file) {
        return Ok(());
    }
    walk.1.push(name.to_owned());
    for need in &module.needs {
        visit(modules, built_in, need, walk)?;
    }
    walk.1.pop();
    walk.0.push(module.file.clone());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modules(list: &[(&str, &[&str])]) -> Modules {
        let module = |(name, needs): &(&str, &[&str])| {
            let needs = needs.iter().map(|need| name_of(need)).collect();
            (name_of(name), Module { file: PathBuf::from(format!("{name}.ko")), needs })
        };
        list.iter().map(module).collect()
    }

    fn names(order: &[PathBuf]) -> Vec<String> {
        order.iter().map(|file| name_of(&file.to_string_lossy())).collect()
    }

    #[test]
    fn what_is_needed_comes_first_and_once() {
        let all = modules(&[("a", &["b", "c"]), ("b", &["c"]), ("c", &[]), ("d", &["c"])]);
        let order = load_order(&all, &[], &["a", "d", "c"]).unwrap();
        assert_eq!(names(&order), ["c", "b", "a", "d"]);
    }

    #[test]
    fn a_built_in_module_needs_no_file() {
        let all = modules(&[("a", &["virtio"])]);
        let order = load_order(&all, &["virtio".to_owned()], &["a", "virtio"]).unwrap();
        assert_eq!(names(&order), ["a"]);
    }

    #[test]
    fn a_missing_module_is_named() {
        let error = load_order(&modules(&[]), &[], &["no-such"]).unwrap_err();
        assert!(error.to_string().ends_with("no_such"));
    }

    #[test]
    fn a_ring_of_modules_is_refused() {
        let all = modules(&[("a", &["b"]), ("b", &["a"])]);
        assert!(load_order(&all, &[], &["a"]).is_err());
    }

    #[test]
    fn a_signature_is_cut_off_and_a_plain_module_left_alone() {
        let mut signed = b"module".to_vec();
        signed.extend_from_slice(&[9; 20]);
        signed.extend_from_slice(&[0, 0, 2, 0, 0, 0, 0, 0]);
        signed.extend_from_slice(&20u32.to_be_bytes());
        signed.extend_from_slice(SIGNATURE_MAGIC);
        assert_eq!(without_signature(&signed), b"module");
        assert_eq!(without_signature(b"module"), b"module");
        assert_eq!(without_signature(SIGNATURE_MAGIC), SIGNATURE_MAGIC);
    }

    #[test]
    fn dependencies_are_read_from_the_module() {
        let module = b"x\0license=GPL\0depends=kvm,virtio-ring\0name=y\0";
        assert_eq!(dependencies(module), ["kvm", "virtio_ring"]);
        assert!(dependencies(b"x\0depends=\0").is_empty());
        assert!(dependencies(b"").is_empty());
    }
}
