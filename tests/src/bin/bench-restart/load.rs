//! A load of the bare guest on one device, and the kills in its midst.

use std::io::Write;
use std::process::ChildStdin;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nacre_tests::blackout::{Clock, Moment, Report, Summary};
use nacre_tests::control::Control;
use nacre_tests::machine::{Machine, Running};
use nacre_tests::supervised::Supervised;

/// The device's name.
const ID: &str = "device";
/// A kill comes at a random moment within so many microseconds behind a report: long enough for
/// the load to be in full swing.
const KILL_WITHIN_US: u64 = 20_000;
/// How often the clocks are set against each other before the first kill.
const CLOCK_READINGS: u32 = 10;

/// A guest at work.
pub(crate) struct Load {
    running: Running,
    input: ChildStdin,
    control: Control,
    clock: Clock,
    dice: u64,
}

impl Load {
    /// Starts the device's first process and a guest that uses it.
    pub(crate) fn start(kind: &str, device: &mut Supervised) -> Result<Self> {
        let socket = device.start()?;
        let (control, theirs) = Control::new()?;
        let machine = Machine::bare(&format!("load-{kind}"))?.with_input();
        let mut running = machine.device_at(ID, kind, socket).control(theirs).start()?;
        let input = running.process().child().stdin.take().context("the VMM's standard input")?;
        running.until("READY")?;
        Ok(Self { running, input, control, clock: Clock::new(), dice: 1 })
    }

    /// Kills the device's process so many times, each time when its successor has been at work.
    pub(crate) fn kill(&mut self, device: &mut Supervised, kills: usize) -> Result<Summary> {
        for _reading in 0..CLOCK_READINGS {
            self.report()?;
        }
        let mut summary = Summary::default();
        for _kill in 0..kills {
            thread::sleep(Duration::from_micros(self.roll(KILL_WITHIN_US)));
            let killed = Moment::now();
            device.kill()?;
            let gone = Moment::now();
            let socket = device.start()?;
            let ready = Moment::now();
            self.control.lost(ID)?;
            self.control.reconnect(ID, &socket)?;
            // Its end in the VMM is all that keeps the connection.
            drop(socket);
            let back = Moment::now();
            let report = self.report()?;
            summary.blackouts_ns.push(self.clock.blackout_ns(&report, killed, back)?);
            for (step, from, to) in
                [("gone", killed, gone), ("ready", gone, ready), ("taken", ready, back)]
            {
                summary.steps.entry(step).or_default().push(self.clock.between_ns(from, to));
            }
        }
        summary.clock = self.clock.to_string();
        Ok(summary)
    }

    /// Tells the guest that it is enough, and waits until it has heard.
    pub(crate) fn end(&mut self) -> Result<()> {
        self.order("q")?;
        self.running.until("over").map(drop)
    }

    /// The guest's last report, with which it passes.
    pub(crate) fn last_report(mut self) -> Result<Report> {
        let report = Report::parse(&self.running.until("report")?)?;
        let ended = self.running.wait()?;
        ensure!(ended.guest.iter().any(|line| line.starts_with("PASS")), "{ended:#?}");
        Ok(report)
    }

    fn report(&mut self) -> Result<Report> {
        let asked = Moment::now();
        self.order("r")?;
        let report = Report::parse(&self.running.until("report")?)?;
        self.clock.learn(asked, &report)?;
        Ok(report)
    }

    fn order(&mut self, order: &str) -> Result<()> {
        self.input.write_all(order.as_bytes()).context("the guest's serial port")?;
        Ok(self.input.flush()?)
    }

    fn roll(&mut self, sides: u64) -> u64 {
        self.dice =
            self.dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (self.dice >> 33) % sides
    }
}
