//! The `resources` of an OCI specification as what is written to a group's files; pure.
//!
//! What has no meaning in cgroup v2 and only tunes version 1 (kernel memory, swappiness, leaf
//! weights, the switch of the out-of-memory killer) is left out, as runc does. What would be a limit
//! and can't be one here is refused.

use libcontainer::oci_spec::runtime::{
    LinuxBlockIo, LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources, LinuxThrottleDevice,
};

/// What a group may have without limit.
const MAX: &str = "max";
/// The most settings of one request.
const SETTINGS_MAX: usize = 1024;
/// The longest value, in bytes.
const VALUE_BYTES_MAX: usize = 4096;

/// Why limits can't be set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LimitError {
    /// Makes no sense.
    #[error("{what} is not allowed: {value:?}")]
    Invalid {
        /// Which part.
        what: &'static str,
        /// What it says.
        value: String,
    },
    /// Can't be honoured.
    #[error("the guest can't honour {0}")]
    Unsupported(&'static str),
}

/// One write to a file of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    /// The file's name.
    pub(crate) file: String,
    /// The line that it is about, in a file with a line for each device.
    pub(crate) line: Option<String>,
    /// What is written.
    pub(crate) value: Value,
}

/// What is written to a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    /// This.
    Text(String),
    /// The quota that the file has, with this period (`cpu.max`).
    Period(u64),
}

impl Setting {
    /// What puts a file back whose text was `old`.
    pub(crate) fn undone(&self, old: &str) -> String {
        let Some(line) = &self.line else {
            return old.trim_end().to_owned();
        };
        let is_line = |found: &&str| found.split(' ').next() == Some(line.as_str());
        let without =
            if self.file == "io.max" { "rbps=max wbps=max riops=max wiops=max" } else { "default" };
        old.lines().find(is_line).map_or_else(|| format!("{line} {without}"), str::to_owned)
    }
}

fn set(file: &str, value: impl Into<String>) -> Setting {
    Setting { file: file.to_owned(), line: None, value: Value::Text(value.into()) }
}

fn invalid(what: &'static str, value: &impl ToString) -> LimitError {
    LimitError::Invalid { what, value: value.to_string() }
}

/// All that is to be written, in this order.
///
/// # Errors
///
/// Fails if a part makes no sense or can't be honoured.
pub(crate) fn settings(resources: &LinuxResources) -> Result<Vec<Setting>, LimitError> {
    let mut settings = Vec::new();
    if let Some(memory) = resources.memory() {
        settings.extend(of_memory(memory)?);
    }
    if let Some(cpu) = resources.cpu() {
        settings.extend(of_cpu(cpu)?);
    }
    if let Some(pids) = resources.pids() {
        let limit = pids.limit();
        settings.push(set("pids.max", if limit > 0 { limit.to_string() } else { MAX.to_owned() }));
    }
    if let Some(io) = resources.block_io() {
        settings.extend(of_io(io)?);
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        settings.extend(of_hugepages(limit)?);
    }
    if resources.rdma().as_ref().is_some_and(|rdma| !rdma.is_empty()) {
        return Err(LimitError::Unsupported("limits of RDMA"));
    }
    let class = resources.network().as_ref().and_then(|network| network.class_id());
    if class.is_some_and(|class| class != 0) {
        return Err(LimitError::Unsupported("network classes"));
    }
    // Last: they are the more exact words.
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (file, value) in unified {
        settings.push(of_unified(file, value)?);
    }
    if settings.len() > SETTINGS_MAX {
        return Err(invalid("so many limits", &settings.len()));
    }
    Ok(settings)
}

/// An amount, or "max" for -1.
fn amount(what: &'static str, bytes: i64) -> Result<String, LimitError> {
    match bytes {
        -1 => Ok(MAX.to_owned()),
        0.. => Ok(bytes.to_string()),
        _ => Err(invalid(what, &bytes)),
    }
}

fn of_memory(memory: &LinuxMemory) -> Result<Vec<Setting>, LimitError> {
    let mut settings = Vec::new();
    // 0 is "not set", in all three.
    let limit = memory.limit().filter(|limit| *limit != 0);
    // The specification counts memory and swap together, the kernel swap alone.
    let swap = match (memory.swap().filter(|both| *both != 0), limit) {
        (Some(-1), _) => Some(MAX.to_owned()),
        (Some(both), Some(limit)) if limit >= 0 && both >= limit => {
            Some((both - limit).to_string())
        }
        (Some(both), _) => {
            return Err(invalid("memory.swap without a smaller memory.limit", &both));
        }
        (None, Some(-1)) => Some(MAX.to_owned()),
        (None, _) => None,
    };
    settings.extend(swap.map(|swap| set("memory.swap.max", swap)));
    if let Some(limit) = limit {
        settings.push(set("memory.max", amount("memory.limit", limit)?));
    }
    if let Some(low) = memory.reservation().filter(|low| *low != 0) {
        settings.push(set("memory.low", amount("memory.reservation", low)?));
    }
    Ok(settings)
}

fn of_cpu(cpu: &LinuxCpu) -> Result<Vec<Setting>, LimitError> {
    if cpu.realtime_runtime().is_some_and(|runtime| runtime != 0)
        || cpu.realtime_period().is_some_and(|period| period != 0)
    {
        return Err(LimitError::Unsupported("real-time shares of processors"));
    }
    let mut settings = Vec::new();
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
        settings.push(set("cpu.weight", weight_of_shares(shares)));
    }
    let quota = cpu.quota().filter(|quota| *quota != 0);
    let quota = quota.map(|quota| if quota < 0 { MAX.to_owned() } else { quota.to_string() });
    match (quota, cpu.period().filter(|period| *period != 0)) {
        (Some(quota), Some(period)) => settings.push(set("cpu.max", format!("{quota} {period}"))),
        (Some(quota), None) => settings.push(set("cpu.max", quota)),
        (None, Some(period)) => settings.push(Setting {
            file: "cpu.max".to_owned(),
            line: None,
            value: Value::Period(period),
        }),
        (None, None) => {}
    }
    if let Some(burst) = cpu.burst() {
        settings.push(set("cpu.max.burst", burst.to_string()));
    }
    if let Some(idle) = cpu.idle() {
        settings.push(set("cpu.idle", idle.to_string()));
    }
    for (file, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
            let is_list = list.len() <= VALUE_BYTES_MAX
                && list.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b',' | b'-'));
            if !is_list {
                return Err(invalid("a list of processors or nodes", &list));
            }
            settings.push(set(file, list.clone()));
        }
    }
    Ok(settings)
}

/// Shares of version 1 (2 to 262144, 1024 by default) as a weight of version 2 (1 to 10000, 100 by
/// default), by the curve through these three that the OCI runtimes agreed on (runc 1.3.2).
fn weight_of_shares(shares: u64) -> String {
    let shares = u32::try_from(shares.clamp(2, 262_144)).unwrap_or(262_144);
    let log = f64::from(shares).log2();
    let weight = 10f64.powf((log * log + 125.0 * log) / 612.0 - 7.0 / 34.0).ceil();
    format!("{:.0}", weight.clamp(1.0, 10_000.0))
}

fn of_io(io: &LinuxBlockIo) -> Result<Vec<Setting>, LimitError> {
    let mut settings = Vec::new();
    let weight = |weight: u16| match weight {
        10..=1000 => Ok(1 + (u32::from(weight) - 10) * 9999 / 990),
        _ => Err(invalid("a weight of block devices", &weight)),
    };
    if let Some(own) = io.weight().filter(|weight| *weight != 0) {
        settings.push(set("io.weight", format!("default {}", weight(own)?)));
    }
    for device in io.weight_device().iter().flatten() {
        if let Some(own) = device.weight().filter(|weight| *weight != 0) {
            let line = number(device.major(), device.minor())?;
            settings.push(of_device("io.weight", &line, &weight(own)?.to_string()));
        }
    }
    let throttled: [(&str, &Option<Vec<LinuxThrottleDevice>>); 4] = [
        ("rbps", io.throttle_read_bps_device()),
        ("wbps", io.throttle_write_bps_device()),
        ("riops", io.throttle_read_iops_device()),
        ("wiops", io.throttle_write_iops_device()),
    ];
    for (what, devices) in throttled {
        for device in devices.iter().flatten() {
            let rate = match device.rate() {
                0 => MAX.to_owned(),
                rate => rate.to_string(),
            };
            let line = number(device.major(), device.minor())?;
            settings.push(of_device("io.max", &line, &format!("{what}={rate}")));
        }
    }
    Ok(settings)
}

fn number(major: i64, minor: i64) -> Result<String, LimitError> {
    let fits = |number: i64| u32::try_from(number).is_ok();
    let text = format!("{major}:{minor}");
    if fits(major) && fits(minor) { Ok(text) } else { Err(invalid("a device's number", &text)) }
}

fn of_device(file: &str, line: &str, value: &str) -> Setting {
    Setting {
        file: file.to_owned(),
        line: Some(line.to_owned()),
        value: Value::Text(format!("{line} {value}")),
    }
}

fn of_hugepages(limit: &LinuxHugepageLimit) -> Result<Vec<Setting>, LimitError> {
    let size = limit.page_size();
    let digits = size.trim_end_matches("KB").trim_end_matches("MB").trim_end_matches("GB");
    let is_size = size.len() == digits.len() + 2
        && (1..=8).contains(&digits.len())
        && digits.bytes().all(|byte| byte.is_ascii_digit());
    if !is_size {
        return Err(invalid("a size of huge pages", &size));
    }
    let bytes = amount("a limit of huge pages", limit.limit())?;
    Ok(vec![set(&format!("hugetlb.{size}.max"), bytes)])
}

fn of_unified(file: &str, value: &str) -> Result<Setting, LimitError> {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_');
    // Those of the core are the agent's: who is in the group, whether it runs.
    let is_file = file.len() <= 64
        && file.bytes().all(known)
        && !file.starts_with('.')
        && file.contains('.')
        && !file.starts_with("cgroup.");
    if !is_file {
        return Err(invalid("a file of the control group", &file));
    }
    if value.len() > VALUE_BYTES_MAX || value.contains(['\0', '\n']) {
        return Err(invalid("a value for the control group", &value));
    }
    Ok(set(file, value))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn told(resources: serde_json::Value) -> Result<Vec<(String, String)>, LimitError> {
        let settings = settings(&serde_json::from_value(resources).unwrap())?;
        let text = |setting: Setting| match setting.value {
            Value::Text(text) => (setting.file, text),
            Value::Period(period) => (setting.file, format!("- {period}")),
        };
        Ok(settings.into_iter().map(text).collect())
    }

    fn is(resources: &serde_json::Value, expected: &[(&str, &str)]) {
        let told = told(resources.clone()).unwrap();
        let told: Vec<_> = told.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        assert_eq!(told, expected, "{resources}");
    }

    #[test]
    fn memory_and_swap_are_told_apart() {
        let memory = json!({ "memory": { "limit": 100, "swap": 150, "reservation": 50 } });
        let files = [("memory.swap.max", "50"), ("memory.max", "100"), ("memory.low", "50")];
        is(&memory, &files);
        is(
            &json!({ "memory": { "limit": -1 } }),
            &[("memory.swap.max", "max"), ("memory.max", "max")],
        );
        is(&json!({ "memory": { "limit": 0, "swap": 0, "swappiness": 10 } }), &[]);
    }

    #[test]
    fn processors_are_shared_as_runtimes_agreed() {
        for (shares, weight) in [(2, "1"), (1024, "100"), (262_144, "10000"), (512, "59")] {
            is(&json!({ "cpu": { "shares": shares } }), &[("cpu.weight", weight)]);
        }
        let cpu = json!({ "cpu": { "quota": 5000, "period": 10_000, "cpus": "0-1,3" } });
        is(&cpu, &[("cpu.max", "5000 10000"), ("cpuset.cpus", "0-1,3")]);
        is(&json!({ "cpu": { "quota": -1, "period": 10_000 } }), &[("cpu.max", "max 10000")]);
        is(&json!({ "cpu": { "period": 10_000 } }), &[("cpu.max", "- 10000")]);
    }

    #[test]
    fn processes_disks_and_huge_pages_are_limited() {
        is(&json!({ "pids": { "limit": 7 } }), &[("pids.max", "7")]);
        is(&json!({ "pids": { "limit": -1 } }), &[("pids.max", "max")]);
        let io = json!({ "blockIO": {
            "weight": 500,
            "throttleWriteBpsDevice": [{ "major": 254, "minor": 0, "rate": 9 }],
            "throttleReadIOPSDevice": [{ "major": 254, "minor": 0, "rate": 0 }]
        } });
        let files = [
            ("io.weight", "default 4950"),
            ("io.max", "254:0 wbps=9"),
            ("io.max", "254:0 riops=max"),
        ];
        is(&io, &files);
        let pages = json!({ "hugepageLimits": [{ "pageSize": "2MB", "limit": 4096 }] });
        is(&pages, &[("hugetlb.2MB.max", "4096")]);
    }

    #[test]
    fn a_device_s_limit_is_put_back_by_its_own_line() {
        let setting = of_device("io.max", "8:0", "rbps=5");
        assert_eq!(setting.undone("8:16 rbps=1\n8:0 rbps=2\n"), "8:0 rbps=2");
        assert_eq!(setting.undone(""), "8:0 rbps=max wbps=max riops=max wiops=max");
        assert_eq!(of_device("io.weight", "8:0", "").undone(""), "8:0 default");
        assert_eq!(set("pids.max", "5").undone("max\n"), "max");
    }

    #[test]
    fn words_for_the_kernel_itself_come_last() {
        let both = json!({ "memory": { "limit": 9 }, "unified": { "memory.high": "5" } });
        is(&both, &[("memory.max", "9"), ("memory.high", "5")]);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let cases = [
            json!({ "memory": { "limit": -5 } }),
            json!({ "memory": { "limit": 100, "swap": 50 } }),
            json!({ "memory": { "swap": 50 } }),
            json!({ "cpu": { "cpus": "0; rm" } }),
            json!({ "cpu": { "realtimeRuntime": 5 } }),
            json!({ "blockIO": { "weight": 5 } }),
            json!({ "blockIO": { "throttleReadBpsDevice": [{ "major": -1, "minor": 0, "rate": 1 }] } }),
            json!({ "hugepageLimits": [{ "pageSize": "../MB", "limit": 1 }] }),
            json!({ "unified": { "cgroup.procs": "1" } }),
            json!({ "unified": { "../memory.max": "1" } }),
            json!({ "unified": { "memory.max": "1\n2" } }),
            json!({ "network": { "classID": 1 } }),
        ];
        for case in cases {
            assert!(told(case.clone()).is_err(), "{case}");
        }
    }
}
