//! Users and groups by the image's own /etc/passwd and /etc/group. Pure.

/// Who a container's program runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// The other groups, in order.
    pub additional_gids: Vec<u32>,
    /// The home folder.
    pub home: String,
}

/// A user or group that the image does not know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AccountError {
    /// Neither a number nor in /etc/passwd.
    #[error("user `{0}` is not in the image's /etc/passwd")]
    UnknownUser(String),
    /// Neither a number nor in /etc/group.
    #[error("group `{0}` is not in the image's /etc/group")]
    UnknownGroup(String),
}

/// One line of /etc/passwd.
struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn accounts(passwd: &str) -> impl Iterator<Item = Account<'_>> {
    passwd.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, uid, gid, _, home, ..] = fields[..] else { return None };
        Some(Account { name, uid: uid.parse().ok()?, gid: gid.parse().ok()?, home })
    })
}

/// Name, id and members of each group.
fn groups(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, gid, members, ..] = fields[..] else { return None };
        Some((name, gid.parse().ok()?, members))
    })
}

/// Resolves `user`, `user:group`, with names or numbers, as the OCI image specification's `User`
/// has it; empty is root.
///
/// # Errors
///
/// Fails if a name is not known. An unknown number is taken as it is, with group 0.
pub fn resolve(user: &str, passwd: &str, group: &str) -> Result<User, AccountError> {
    let (user, named_group) = match user.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (user, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number = user.parse().ok();
    let by_name = || accounts(passwd).find(|account| account.name == user);
    let by_number = || accounts(passwd).find(|account| Some(account.uid) == number);
    let account = by_name().or_else(by_number);
    let uid = account
        .as_ref()
        .map(|account| account.uid)
        .or(number)
        .ok_or_else(|| AccountError::UnknownUser(user.to_owned()))?;
    let home = account.as_ref().map(|account| account.home).filter(|home| !home.is_empty());
    let home = home.unwrap_or(if uid == 0 { "/root" } else { "/" }).to_owned();
    let Some(named_group) = named_group else {
        let name = account.as_ref().map(|account| account.name);
        let gid = account.as_ref().map_or(0, |account| account.gid);
        let is_member = |members: &str| members.split(',').any(|member| Some(member) == name);
        let additional_gids = groups(group)
            .filter(|(_, id, members)| *id != gid && is_member(members))
            .map(|(_, id, _)| id)
            .collect();
        return Ok(User { uid, gid, additional_gids, home });
    };
    let gid = groups(group)
        .find(|(name, ..)| *name == named_group)
        .map(|(_, id, _)| id)
        .or_else(|| named_group.parse().ok())
        .ok_or_else(|| AccountError::UnknownGroup(named_group.to_owned()))?;
    Ok(User { uid, gid, additional_gids: Vec::new(), home })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{prop_assert, proptest};

    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:34:web:/srv:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nweb:x:34:\nlog:x:50:ann,web\nother:x:51:ann\n";

    fn resolved(user: &str) -> (u32, u32, Vec<u32>, String) {
        let user = resolve(user, PASSWD, GROUP).unwrap();
        (user.uid, user.gid, user.additional_gids, user.home)
    }

    #[test]
    fn names_and_numbers_are_resolved() {
        assert_eq!(resolved(""), (0, 0, vec![], "/root".to_owned()));
        assert_eq!(resolved("web"), (33, 34, vec![50], "/srv".to_owned()));
        assert_eq!(resolved("33"), (33, 34, vec![50], "/srv".to_owned()));
        assert_eq!(resolved("web:log"), (33, 50, vec![], "/srv".to_owned()));
        assert_eq!(resolved("1000:7"), (1000, 7, vec![], "/".to_owned()));
    }

    #[test]
    fn unknown_names_are_told() {
        assert_eq!(
            resolve("nobody", PASSWD, GROUP),
            Err(AccountError::UnknownUser("nobody".to_owned()))
        );
        assert_eq!(
            resolve("0:no", PASSWD, GROUP),
            Err(AccountError::UnknownGroup("no".to_owned()))
        );
        assert!(resolve("-1", PASSWD, GROUP).is_err());
        assert!(resolve("4294967296", PASSWD, GROUP).is_err());
    }

    proptest! {
        #[test]
        fn any_files_and_user_give_an_account_or_an_error(
            user in ".{0,20}",
            passwd in "([a-z0-9:/\n-]|.){0,200}",
            group in "([a-z0-9:,\n-]|.){0,200}",
        ) {
            if let Ok(user) = resolve(&user, &passwd, &group) {
                prop_assert!(!user.home.is_empty());
                prop_assert!(!user.additional_gids.contains(&user.gid));
            }
        }
    }
}
