//! QEMU's monitor: a command and its answer, a line of JSON each (QEMU Machine Protocol, version 1);
//! events that come between are kept.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// Far above what the guest's slowest answer takes.
const PATIENCE: Duration = Duration::from_secs(120);

/// A line that QEMU said.
#[derive(Debug, PartialEq)]
enum Said {
    Answer(Value),
    Failure(String),
    Event(Value),
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Qmp {
    lines: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Qmp {
    pub(crate) fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).context("QEMU's monitor")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut qmp = Self { lines: BufReader::new(stream), events: Vec::new() };
        let greeting = qmp.line()?;
        ensure!(greeting.contains("\"QMP\""), "no greeting: {greeting}");
        qmp.ask("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// Has QEMU do something; gives what it returns.
    pub(crate) fn ask(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut asked = json!({"execute": command});
        if !arguments.is_null() {
            asked["arguments"] = arguments;
        }
        writeln!(self.lines.get_mut(), "{asked}")?;
        loop {
            match said(&self.line()?)? {
                Said::Answer(value) => return Ok(value),
                Said::Failure(reason) => bail!("{command}: {reason}"),
                Said::Event(event) => self.events.push(event),
            }
        }
    }

    /// Waits for an event whose data fit; those before it are forgotten.
    pub(crate) fn event(&mut self, name: &str, fits: impl Fn(&Value) -> bool) -> Result<()> {
        let is_it = |event: &Value| event["event"] == name && fits(&event["data"]);
        loop {
            if let Some(at) = self.events.iter().position(is_it) {
                self.events.drain(..=at);
                return Ok(());
            }
            match said(&self.line()?)? {
                Said::Event(event) => self.events.push(event),
                other => bail!("an answer to nothing: {other:?}"),
            }
        }
    }

    /// What was told and not asked for.
    pub(crate) fn events(&self) -> &[Value] {
        &self.events
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        let read = self.lines.read_line(&mut line).context("QEMU's monitor is silent")?;
        ensure!(read > 0, "QEMU hung up");
        Ok(line)
    }
}

fn said(line: &str) -> Result<Said> {
    let mut value: Value = serde_json::from_str(line)?;
    if let Some(answer) = value.get_mut("return") {
        return Ok(Said::Answer(answer.take()));
    }
    if let Some(error) = value.get("error") {
        return Ok(Said::Failure(error["desc"].as_str().unwrap_or_default().to_owned()));
    }
    ensure!(value.get("event").is_some(), "neither an answer nor an event: {line}");
    Ok(Said::Event(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_failures_and_events_are_told_apart() {
        assert_eq!(said("{\"return\": {\"a\": 1}}").unwrap(), Said::Answer(json!({"a": 1})));
        let failure = "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no slot\"}}";
        assert_eq!(said(failure).unwrap(), Said::Failure("no slot".to_owned()));
        let event = json!({"event": "DEVICE_DELETED", "data": {"device": "disk"}});
        assert_eq!(said(&event.to_string()).unwrap(), Said::Event(event));
        assert!(said("{}").is_err() && said("no JSON").is_err());
    }

    #[test]
    fn an_event_that_came_before_its_answer_is_not_lost() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut qmp = Qmp { lines: BufReader::new(ours), events: Vec::new() };
        let event = |device: &str| json!({"event": "DEVICE_DELETED", "data": {"device": device}});
        write!(theirs, "{}\n{}\n{{\"return\": {{}}}}\n", event("nic"), event("disk")).unwrap();
        qmp.ask("device_del", json!({"id": "disk"})).unwrap();
        qmp.event("DEVICE_DELETED", |data| data["device"] == "disk").unwrap();
        assert_eq!(qmp.events(), &[] as &[Value]);
        // A socket with something unread in it is reset, and not at its end.
        let mut asked = String::new();
        BufReader::new(&theirs).read_line(&mut asked).unwrap();
        assert!(asked.contains("\"execute\":\"device_del\""), "{asked}");
        drop(theirs);
        let hung_up = qmp.event("DEVICE_DELETED", |_| true).unwrap_err();
        assert!(hung_up.to_string().contains("hung up"), "{hung_up}");
    }
}
