//! The program of a container: what the image proposes and what was asked for, put together. Pure.

use serde_json::{Value, json};

use crate::{
    image::{ImageDefaults, accounts},
    plan::{PlanError, absolute},
};

/// What is set if neither the image nor the user sets it.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program to be run in a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcessConfig {
    /// The program and its arguments.
    pub arguments: Vec<String>,
    /// `NAME=value` each; a later one of the same name wins.
    pub env: Vec<String>,
    /// `user`, `user:group`, names or numbers; empty is root.
    pub user: String,
    /// Absolute; empty is `/`.
    pub working_dir: String,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// Whether its standard input is connected.
    pub stdin: bool,
}

impl ProcessConfig {
    /// What an image proposes, with `command` in the place of its own.
    #[must_use]
    pub fn from_image(image: &ImageDefaults, command: Vec<String>) -> Self {
        let mut arguments = image.entrypoint.clone();
        arguments.extend(if command.is_empty() { image.command.clone() } else { command });
        Self {
            arguments,
            env: image.env.clone(),
            user: image.user.clone(),
            working_dir: image.working_dir.clone(),
            ..Self::default()
        }
    }
}

/// The `process` object of an OCI runtime specification (config.md, "Process"), without
/// capabilities and limits.
///
/// # Errors
///
/// Fails if there is no program, a variable has no name, or the user is not known.
pub fn object(
    config: &ProcessConfig,
    hostname: &str,
    passwd: &str,
    group: &str,
) -> Result<Value, PlanError> {
    let program = config.arguments.first().ok_or(PlanError::NoCommand)?;
    if program.is_empty() {
        return Err(PlanError::NoCommand);
    }
    if config.arguments.iter().any(|argument| argument.contains('\0')) {
        return Err(PlanError::Nul("an argument"));
    }
    let cwd = if config.working_dir.is_empty() { "/" } else { &config.working_dir };
    absolute("working folder", cwd.as_ref())?;
    let user = accounts::resolve(&config.user, passwd, group)?;
    Ok(json!({
        "terminal": config.terminal,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.additional_gids},
        "args": config.arguments,
        "env": environment(config, hostname, &user.home)?,
        "cwd": cwd,
        "noNewPrivileges": false,
    }))
}

fn environment(
    config: &ProcessConfig,
    hostname: &str,
    home: &str,
) -> Result<Vec<String>, PlanError> {
    let mut env = vec![PATH.to_owned(), format!("HOSTNAME={hostname}"), format!("HOME={home}")];
    if config.terminal {
        env.push("TERM=xterm".to_owned());
    }
    for variable in &config.env {
        let name = variable.split_once('=').map(|(name, _)| name).filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| PlanError::Environment(variable.clone()))?;
        if variable.contains('\0') {
            return Err(PlanError::Nul("an environment variable"));
        }
        let prefix = format!("{name}=");
        env.retain(|earlier| !earlier.starts_with(&prefix));
        env.push(variable.clone());
    }
    Ok(env)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> ImageDefaults {
        ImageDefaults {
            env: vec!["A=image".to_owned()],
            entrypoint: vec!["/entry".to_owned()],
            command: vec!["default".to_owned()],
            user: "7".to_owned(),
            working_dir: "/srv".to_owned(),
        }
    }

    #[test]
    fn a_command_replaces_the_images_own_but_not_its_entry_point() {
        let given = ProcessConfig::from_image(&image(), vec!["given".to_owned()]);
        assert_eq!(given.arguments, ["/entry", "given"]);
        let none = ProcessConfig::from_image(&image(), Vec::new());
        assert_eq!(none.arguments, ["/entry", "default"]);
    }

    #[test]
    fn later_variables_win_and_defaults_yield() {
        let mut config = ProcessConfig::from_image(&image(), Vec::new());
        config.env.extend(["A=user", "HOME=/x"].map(str::to_owned));
        let object = object(&config, "host", "", "").unwrap();
        let env: Vec<&str> =
            object["env"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
        assert_eq!(env, [PATH, "HOSTNAME=host", "A=user", "HOME=/x"]);
        assert_eq!(object["user"]["uid"], 7);
        assert_eq!(object["cwd"], "/srv");
    }

    #[test]
    fn what_can_be_no_process_is_refused() {
        let refused = |change: fn(&mut ProcessConfig)| {
            let mut config = ProcessConfig::from_image(&image(), Vec::new());
            change(&mut config);
            object(&config, "host", "", "").unwrap_err()
        };
        assert_eq!(refused(|config| config.arguments.clear()), PlanError::NoCommand);
        assert!(matches!(
            refused(|config| config.env.push("=x".to_owned())),
            PlanError::Environment(_)
        ));
        assert!(matches!(
            refused(|config| config.working_dir = "srv".to_owned()),
            PlanError::NotAbsolute { .. }
        ));
        assert!(matches!(refused(|config| config.user = "web".to_owned()), PlanError::Account(_)));
        assert!(matches!(
            refused(|config| config.arguments.push("a\0b".to_owned())),
            PlanError::Nul(_)
        ));
    }
}
